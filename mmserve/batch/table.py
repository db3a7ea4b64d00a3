"""Answers as a table for a terminal. Knows nothing about how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from mmserve.batch.questions import Question
from mmserve.batch.runner import is_error, report_of, text_of

STAGES = ("decode", "encode", "prefill", "generate", "total")
MIN_WIDTH = 110  # where no terminal gives one


def answers_table(questions: Sequence[Question], rows: dict[str, dict[str, Any]]) -> Table:
    """One row per question: answer, right or wrong, visual tokens before and after, milliseconds."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("question", max_width=40)
    table.add_column("answer", overflow="ellipsis", no_wrap=True, max_width=24)
    for name in ("result", "visual tokens", *(f"{stage} ms" for stage in STAGES)):
        # the question wraps on a narrow terminal, the figures never
        width = max(map(len, name.split()))
        justify: JustifyMethod = "left" if name == "result" else "right"
        table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=True, min_width=width)
    for question in questions:
        row = rows[question.question_id]
        report = report_of(row)
        usage, timings = report.get("usage") or {}, report.get("timings_ms") or {}
        table.add_row(
            Text(_one_line(question.text or question.question_id)),
            Text(_one_line(text_of(row))),
            _result(row),
            _tokens(usage),
            *(f"{timings[stage]:.0f}" if stage in timings else "" for stage in STAGES),
        )
    return table


def _result(row: dict[str, Any]) -> Text:
    if is_error(row):
        return Text("error", style="red")
    if "correct" not in row:
        return Text("")
    return Text("right", style="green") if row["correct"] else Text("wrong", style="red")


def _tokens(usage: dict[str, Any]) -> str:
    if "visual_tokens" not in usage:
        return ""
    return f"{usage['visual_tokens']} → {usage['visual_tokens_kept']}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
