"""The report of a benchmark: rows, and what they were measured on, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmserve.errors import BadRequest
from mmserve.evaluation.report import commit, machine

Json = dict[str, Any]
Tell = Callable[[str], None]


def document(bench: str, settings: Json, rows: Sequence[Json]) -> Json:
    """`settings` say what was run, so that it can be run again."""
    return {
        "bench": bench,
        "machine": machine(),
        "commit": commit(),
        "settings": settings,
        "rows": list(rows),
    }


def deliver(measure: Callable[[Tell], Json], json_out: Path | None) -> None:
    """Measure, with progress and the table on stderr; `json_out` "-" prints the report."""
    alone = json_out is not None and str(json_out) == "-"
    if json_out is not None and not alone and not json_out.resolve().parent.is_dir():
        raise BadRequest(f"Expected a file in a folder that exists, but got {json_out}")
    report = measure(lambda line: typer.echo(line, err=True))
    Console(stderr=True).print(table(report["rows"]))
    if alone:
        typer.echo(json.dumps(report))
    elif json_out is not None:
        json_out.write_text(json.dumps(report) + "\n", encoding="utf-8")


def table(rows: Sequence[Json]) -> Table:
    """One line per row; a gate is marked as passed or missed."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("metric", no_wrap=True)
    for name in ("ours", "peer", "ratio", "gate", "goal", "runs"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(
            row["metric"],
            f"{row['ours']:g} {row['unit']}",
            _number(row["peer"]),
            _number(row["ratio"]),
            _gate(row),
            _number(row.get("goal")),
            str(row["runs"]),
        )
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _gate(row: Json) -> Text:
    if "gate" not in row:
        return Text("-")
    verdict, style = ("passed", "green") if row["passed"] else ("missed", "red")
    return Text(f"{row['gate']:g} {verdict}", style=style)
