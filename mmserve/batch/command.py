"""`mmserve batch`: from two file names to answers, a table and the accuracy.

Knows nothing about options, models or HTTP; the command line brings who answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import typer

from mmserve.batch.answerers import Answerer
from mmserve.batch.answers import AnswerFile
from mmserve.batch.questions import Question, is_url, modality_of, read_questions
from mmserve.batch.runner import check_methods, is_error, run, select, tally
from mmserve.progress import progress_bar
from mmserve.request import Methods
from mmserve.sampling import SamplingParams

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to answer and where to. `methods` is None where a server decides."""

    questions: Path
    output: Path
    methods: Methods | None
    max_tokens: int = 64
    concurrency: int = 16
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    retry_errors: bool = False
    table: bool = False


def answer(job: Job, open_answerer: Callable[[], AbstractContextManager[Answerer]]) -> int:
    """Answer what is open, print what was asked for; the exit code. Nobody is called for nothing."""
    every = _read(job)
    chosen = select(every, limit=job.limit, shard=job.shard)
    wanted = {question.question_id for question in chosen}

    def again(row: dict[str, Any]) -> bool:
        return job.retry_errors and is_error(row) and str(row.get("custom_id", row.get("id"))) in wanted

    with AnswerFile(job.output, [question.question_id for question in every], again) as file:
        if job.methods is not None:
            check_methods(list(file.rows.values()), msgspec.to_builtins(job.methods))
        todo = [question for question in chosen if question.question_id not in file.rows]
        if len(todo) < len(chosen):
            typer.echo(f"{len(chosen) - len(todo)} of {len(chosen)} are answered already", err=True)
        needed = any(question.problem is None for question in todo)
        with (
            open_answerer() if needed else nullcontext(_Nobody()) as answerer,
            progress_bar(len(todo), "answering") as advance,
        ):
            run(todo, answerer, file, concurrency=job.concurrency, on_row=advance)
        file.finalise([question.question_id for question in every])
        return _conclude(job, chosen, file.rows)


def dry_run(job: Job) -> int:
    """Say what a run would do, and every row that cannot be asked; 1 when there is one."""
    chosen = select(_read(job), limit=job.limit, shard=job.shard)
    problems = [question for question in chosen if question.problem is not None]
    media = {source for question in chosen for source in question.media}
    kinds = Counter(modality_of(source) for source in media)
    files = sum(not is_url(source) for source in media)
    keyed = sum(question.answer is not None for question in chosen)
    _show_problems(problems)
    typer.echo(
        f"questions: {len(chosen)}, with an answer key: {keyed}, with options: "
        f"{sum(bool(question.options) for question in chosen)}, OpenAI lines: "
        f"{sum(question.body is not None for question in chosen)}"
    )
    typer.echo(
        f"media: {len(media)} ({kinds['video']} videos, {kinds['image']} images; {files} files, "
        f"{len(media) - files} URLs)"
    )
    typer.echo(f"rows that cannot be asked: {len(problems)}")
    return 1 if problems else 0


def _read(job: Job) -> list[Question]:
    return read_questions(job.questions, SamplingParams(max_tokens=job.max_tokens))


class _Nobody:
    """Answers when there is nothing to ask."""

    def start(self, question: Question, done: object) -> None:
        raise AssertionError(f"{question.question_id} can be asked, and nobody is there to answer")


def _conclude(job: Job, chosen: Sequence[Question], rows: dict[str, dict[str, Any]]) -> int:
    if job.table:
        from rich.console import Console

        from mmserve.batch.table import MIN_WIDTH, answers_table

        console = Console()
        console = console if console.is_terminal else Console(width=max(console.width, MIN_WIDTH))
        console.print(answers_table(chosen, rows))
    failed = sum(is_error(rows[question.question_id]) for question in chosen)
    if failed:
        hint = "the rows say why; --retry-errors asks them again"
        typer.echo(f"error: {failed} of {len(chosen)} questions failed; {hint}", err=True)
    if (marks := tally(chosen, rows)) is not None:
        typer.echo(f"accuracy: {marks[0]}/{marks[1]}")
    return 1 if failed else 0


def _show_problems(problems: Sequence[Question]) -> None:
    for question in problems[:SHOWN_PROBLEMS]:
        assert question.problem is not None
        typer.echo(f"line {question.line}: {question.problem.public_message}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        typer.echo(f"and {len(problems) - SHOWN_PROBLEMS} more", err=True)
