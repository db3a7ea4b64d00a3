"""`mmserve eval`: asks suites under a sweep of settings and reports accuracy beside cost.

Every setting gets a pipeline of its own and its questions one after the other, so that no cache
filled by an earlier setting flatters a later one. Knows nothing about the command line.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import typer

from mmserve.attention.base import REUSE_EVERY, load_pattern
from mmserve.batch.answerers import Answer, LocalAnswerer, Submits
from mmserve.batch.questions import Question, read_questions
from mmserve.batch.runner import answer_all
from mmserve.batch.score import is_correct
from mmserve.budget import Budget, read_keep
from mmserve.config import MethodDefaults
from mmserve.errors import BadRequest
from mmserve.evaluation import report
from mmserve.evaluation.outputs import Outputs
from mmserve.evaluation.suites import SUITES, write_suite
from mmserve.methods import INNER, NAMES, WITH_PROFILE, WITH_WEIGHTS, Kind, choose_methods, takes_no_keep
from mmserve.models.resolve import resolve
from mmserve.progress import progress_bar
from mmserve.request import MediaOptions, Methods, Timings, Usage
from mmserve.sampling import SamplingParams

log = logging.getLogger(__name__)

Json = dict[str, Any]
KEEPS = (0.5, 0.25, 0.1)  # of --keep all
BUDGETS = (0.5, 0.25, 0.1)  # of --kv-budget all
DEFAULT_BUDGETS = (0.25,)  # of a policy that was named without saying how hard
RECALLED = 16  # clips on which the attention recall of a sparse setting is measured
ALL_FRAMES = 64  # no suite's clip is longer, so nothing that is asked about goes unseen
MAX_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to evaluate. `sweep` begins with the dense setting."""

    suites: tuple[str, ...]
    sweep: tuple[Methods, ...]
    limit: int = 100
    seed: int = 0
    options: MediaOptions = field(default_factory=lambda: MediaOptions(num_frames=ALL_FRAMES))


def suite_names(text: str) -> tuple[str, ...]:
    """A comma list of suites, or all."""
    names = SUITES if text == "all" else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SUITES:
            raise BadRequest(f"Expected a suite of {', '.join(SUITES)}, but got {name!r}")
    return names


def sweep(
    *,
    prune: str,
    keep: str | None,
    attention: str,
    kv: str,
    kv_budget: str | None,
    kv_dtype: str,
    keep_image: str | None = None,
    prune_options: Json | None = None,
    attention_options: Json | None = None,
    attention_dense_below: int | None = None,
    attention_profile: str | None = None,
    kv_options: Json | None = None,
    prune_text_images: bool = False,
) -> tuple[Methods, ...]:
    """Every combination of comma lists (or "all"), the dense setting first whether it was named or not."""
    prunes, policies = _listed("prune", prune), _listed("kv", kv)
    patterns = _listed("attention", attention)
    of_patterns = _pattern_options(patterns, attention_options or {})
    if (keep or keep_image) and all(map(takes_no_keep, prunes)):
        raise BadRequest(f"Expected a method of --prune whose keep can be set, but got {', '.join(prunes)}")
    if kv_budget is not None and policies == ("none",):
        raise BadRequest("Expected a method of --kv for --kv-budget, but got none")
    keeps, budgets = _keeps("keep", keep), _numbers("kv_budget", kv_budget, BUDGETS)
    settings = [
        choose_methods(
            MethodDefaults(),
            prune=p,
            keep=share,
            keep_image=of_image,
            prune_options={} if p == "none" else prune_options,
            prune_text_images=prune_text_images,
            attention=a,
            attention_options=of_patterns[a],
            attention_dense_below=None if a == "dense" else attention_dense_below,
            attention_profile=attention_profile if a in WITH_PROFILE else None,
            kv=policy,
            kv_budget=budget,
            kv_options={} if policy == "none" else kv_options,
            kv_dtype=dtype,
        )
        for p in prunes
        for share in ((None,) if takes_no_keep(p) else keeps)
        for of_image in ((None,) if takes_no_keep(p) or p in INNER else _keeps("keep_image", keep_image))
        for a in patterns
        for policy in policies
        for budget in (budgets if policy != "none" else (None,))
        for dtype in _listed("kv_dtype", kv_dtype)
    ]
    return tuple(dict.fromkeys([Methods(), *settings]))


def evaluate(
    plan: Plan,
    open_llm: Callable[[Methods], AbstractContextManager[Submits]],
    geometry: report.Geometry,
    *,
    outputs: Outputs | None = None,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Json]:
    """The report's rows, suite by suite. `outputs` gets a line per question and setting.

    What it holds already is not asked again.
    """
    rows: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="mmserve-eval-") as folder:
        for suite in plan.suites:
            file = write_suite(suite, Path(folder) / suite, plan.limit, plan.seed)
            questions = read_questions(file, SamplingParams(max_tokens=MAX_TOKENS))
            dense: list[report.Outcome] = []
            for methods in plan.sweep:
                settings = msgspec.to_builtins(methods)
                answers = {
                    question.question_id: known
                    for question in questions
                    if outputs and (known := outputs.known(suite, settings, question.question_id))
                }
                for _ in answers:
                    on_answer()
                todo = [question for question in questions if question.question_id not in answers]
                for question, answer in _ask(todo, plan, methods, open_llm):
                    answers[question.question_id] = answer
                    if answer.error is not None:
                        log.warning("%s failed: %s", question.question_id, answer.error.public_message)
                    if outputs is not None:
                        outputs.append(_output(suite, settings, question, answer))
                    on_answer()
                outcomes = [_outcome(question, answers[question.question_id]) for question in questions]
                dense = dense or outcomes
                recall = _recall(questions, plan, methods, open_llm)
                rows.append(report.row(suite, methods, outcomes, dense, geometry, recall))
    return rows


def command(
    plan: Plan,
    model: str,
    open_llm: Callable[[Methods], AbstractContextManager[Submits]],
    *,
    outputs: Path | None,
    json_out: Path | None,
) -> int:
    """Evaluate, print the table, write the files; the exit code. `json_out` "-" prints the report alone."""
    alone = json_out is not None and str(json_out) == "-"
    for target in (outputs, None if alone else json_out):
        if target is not None and not target.resolve().parent.is_dir():
            raise BadRequest(f"Expected a file in a folder that exists, but got {target}")
    checkpoint = resolve(model)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    geometry = report.Geometry.from_config(config)
    total = len(plan.suites) * len(plan.sweep) * plan.limit
    with ExitStack() as stack:
        lines = stack.enter_context(Outputs(outputs, _run(plan, checkpoint))) if outputs else None
        advance = stack.enter_context(progress_bar(total, "evaluating", plain=True))
        rows = evaluate(plan, open_llm, geometry, outputs=lines, on_answer=advance)
    typer.echo(report.markdown(rows), err=alone)
    if json_out is not None:
        document = json.dumps(report.document(rows))
        if alone:
            typer.echo(document)
        else:
            json_out.write_text(document + "\n", encoding="utf-8")
    failed = sum(row["failed"] for row in rows)
    if failed:
        typer.echo(f"error: {failed} of {total} questions failed and count as wrong", err=True)
    return 1 if failed else 0


def _run(plan: Plan, checkpoint: Path) -> Json:
    """What an answer depends on beside its question and the methods."""
    from mmserve.models.loader import weights_revision

    revision = weights_revision(checkpoint)[:16]
    return {"weights": revision, "media": msgspec.to_builtins(plan.options), "max_tokens": MAX_TOKENS}


def _ask(
    questions: Sequence[Question],
    plan: Plan,
    methods: Methods,
    open_llm: Callable[[Methods], AbstractContextManager[Submits]],
) -> Iterator[tuple[Question, Answer]]:
    if not questions:
        return
    with open_llm(methods) as llm:
        # one at a time: a time measured beside other requests is theirs as well
        yield from answer_all(questions, LocalAnswerer(llm, methods, plan.options), concurrency=1)


def _recall(
    questions: Sequence[Question],
    plan: Plan,
    methods: Methods,
    open_llm: Callable[[Methods], AbstractContextManager[Submits]],
) -> float | None:
    """Share of the dense attention's weight that is seen, on a question of each of some clips; slow."""
    if methods.attention == "dense":
        return 1.0
    clips = {" ".join(question.media): question for question in reversed(questions)}
    with open_llm(methods) as llm:
        answerer = LocalAnswerer(llm, methods, plan.options, report_attention=True)
        answers = [answer for _, answer in answer_all([*clips.values()][-RECALLED:], answerer, concurrency=1)]
    found = [msgspec.convert(answer.usage, Usage) for answer in answers if answer.error is None]
    return report.mean_by_layer(found, lambda usage: usage.attention_recall)


def _pattern_options(patterns: Sequence[str], given: Json) -> dict[str, Json]:
    """The settings of each pattern: "name.setting" is that pattern's, "setting" of all that have it."""
    found: dict[str, Json] = {}
    taken = set()
    for pattern in patterns:
        known: list[str] = []
        if pattern != "dense":
            known = [REUSE_EVERY, *(field.name for field in fields(load_pattern(pattern)))]
        own = {name: value for name, value in given.items() if name in known}
        prefix = f"{pattern}."
        of_this = {name: value for name, value in given.items() if name.startswith(prefix)}
        taken |= {*own, *of_this}
        found[pattern] = own | {name.removeprefix(prefix): value for name, value in of_this.items()}
    if left := [name for name in given if name not in taken]:
        raise BadRequest(f"Expected settings of {', '.join(patterns)}, but got {left[0][:40]!r}")
    return found


def _outcome(question: Question, answer: Answer) -> report.Outcome:
    failed = answer.error is not None
    return report.Outcome(
        question_id=question.question_id,
        kind=question.meta["kind"],
        clip=" ".join(question.media),
        correct=_is_right(question, answer),
        usage=None if failed else msgspec.convert(answer.usage, Usage),
        timings_ms=None if failed else msgspec.convert(answer.timings_ms, Timings),
    )


def _is_right(question: Question, answer: Answer) -> bool:
    assert question.answer is not None, "a suite's questions have keys"
    return answer.error is None and is_correct(answer.text, question.answer)


def _output(suite: str, settings: Json, question: Question, answer: Answer) -> Json:
    line: Json = {
        "suite": suite,
        "settings": settings,
        "id": question.question_id,
        "meta": question.meta,
        "question": question.text,
        "expected": question.answer,
        "answer": None if answer.error else answer.text,
        "correct": _is_right(question, answer),
        "usage": answer.usage,
        "timings_ms": answer.timings_ms,
    }
    if answer.error is not None:
        line["error"] = {"code": answer.error.code, "message": answer.error.public_message}
    return line


def _listed(kind: Kind, text: str) -> tuple[str, ...]:
    every = tuple(name for name in NAMES[kind] if name not in WITH_WEIGHTS)
    return every if text == "all" else tuple(dict.fromkeys(text.split(",")))


def _keeps(name: str, text: str | None) -> tuple[Budget | None, ...]:
    """None is what a method keeps where nothing is said."""
    if text is None:
        return (None,)
    return KEEPS if text == "all" else tuple(dict.fromkeys(read_keep(part, name) for part in text.split(",")))


def _numbers(name: str, text: str | None, every: tuple[float, ...]) -> tuple[float, ...]:
    if text is None:
        return DEFAULT_BUDGETS
    if text == "all":
        return every
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise BadRequest(f"Expected {name} as numbers, a comma between them, but got {text}") from error
