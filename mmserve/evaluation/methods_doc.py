"""`docs/methods.md` from the registries and from what evaluations and benchmarks reported.

    python -m mmserve.evaluation.methods_doc --eval E.json --bench B.json -o docs/methods.md

Says only what a registry declares or a report holds. Knows nothing about how either was made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from mmserve import catalogue
from mmserve.evaluation import report
from mmserve.request import Methods

Json = dict[str, Any]

INTRODUCTION = """# Methods

Made by `python -m mmserve.evaluation.methods_doc` from the registries and from reports; do not edit it.

Everything is off unless a deployment or a request asks for it. `mmserve methods` prints the same lists
for the installed version. *exact* means that the number of survivors is known before anything is
computed, *bound* that only its upper limit is. A method that looks at the question shares less between
questions: its KV is common only up to the first media item.
"""

TITLES = {
    "prune": (
        "Visual tokens (`--prune`)",
        "An outer and an inner method go together as in `--prune holitom+fastv`: the first acts behind the "
        "vision tower, the second inside the language model.",
    ),
    "attention": ("Attention of prompts (`--attention`)", ""),
    "kv": ("KV cache (`--kv`)", ""),
    "kv_dtype": (
        "Storage of the KV cache (`--kv-dtype`)",
        "One for a deployment. `int8`, `fp8` and `int4` are of answers; prompts are computed "
        "in the model's type. Keys have a scale per channel and page, values one per slot, as in KIVI "
        "(https://arxiv.org/abs/2402.02750), and the newest page of every head stays in floats.",
    ),
}

MEASURED = """## Measured

Accuracy on ClipWorld's held-out suites with the embedded model, and ratios to the dense run of the same
command (below 1 is less). "to dense" is the difference in points with its standard error over clips, p
the exact paired test that it is chance. Times are of a model of 5.8 million parameters, whose prefill is
too short for reduction to pay; `mmserve bench methods` measures speed where it does.
"""


def document(evaluations: Sequence[Json], benches: Sequence[Json]) -> str:
    """The whole page, from the documents of `eval --json` and of `bench methods --json`."""
    parts = [INTRODUCTION]
    entries = catalogue.describe()
    for kind, (title, words) in TITLES.items():
        rows = [_listed(entry) for entry in entries if entry["kind"] == kind]
        settings = [
            (f"`{entry['name']}`", *row)
            for entry in entries
            if entry["kind"] == kind
            for row in catalogue.settings_of(entry)
        ]
        tables = [_table(COLUMNS, rows), _table(SETTINGS, settings) if settings else ""]
        parts.append("\n\n".join(filter(None, [f"## {title}", words, *tables])) + "\n")
    if evaluations:
        parts.append(MEASURED)
        parts += [f"{_source(found)}\n\n{report.markdown(found['rows'])}\n" for found in evaluations]
    for found in benches:
        parts.append(f"## Speed of {_named(found['settings']['methods'])}\n\n{_source(found)}\n")
        parts.append(_table(SPEED, [_timed(row) for row in found["rows"]]) + "\n")
    return "\n".join(parts)


COLUMNS = ("name", "acts at", "sees the question", "whole item", "count", "paper")
SETTINGS = ("name", "setting", "default", "what it is")
SPEED = ("metric", "with", "without", "ratio", "gate", "paired runs")


def _listed(entry: Json) -> tuple[str, ...]:
    return (
        f"`{entry['name']}`" + (" (needs trained weights)" if entry["trained_weights"] else ""),
        entry["acts_at"],
        "yes" if entry["needs_query"] else "no",
        "yes" if entry["needs_whole_item"] else "no",
        entry["count"],
        entry["paper"] or "-",
    )


def _timed(row: Json) -> tuple[str, ...]:
    gate = "-" if "gate" not in row else f"{row['gate']:g} {'passed' if row['passed'] else 'missed'}"
    ours, peer = f"{row['ours']:g} {row['unit']}", f"{row['peer']:g} {row['unit']}"
    return row["metric"], ours, peer, f"{row['ratio']:g}", gate, str(row["runs"])


def _named(methods: Json) -> str:
    usual = msgspec.to_builtins(Methods())
    return ", ".join(f"{name} {value}" for name, value in methods.items() if value != usual.get(name))


def _source(found: Json) -> str:
    machine, commit = found["machine"], (found["commit"] or "unknown")[:12]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, commit {commit}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell or '-' for cell in line)} |" for line in lines)


def write(
    target: Annotated[Path, typer.Option("-o", "--output", help="The page.", metavar="F")],
    evaluations: Annotated[
        list[Path] | None, typer.Option("--eval", help="A report of `mmserve eval --json`.", exists=True)
    ] = None,
    benches: Annotated[
        list[Path] | None,
        typer.Option("--bench", help="A report of `mmserve bench methods --json`.", exists=True),
    ] = None,
) -> None:
    """Write docs/methods.md."""
    found = [[json.loads(file.read_text()) for file in files or ()] for files in (evaluations, benches)]
    target.write_text(document(*found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(write)
