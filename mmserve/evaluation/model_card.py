"""Measures `tiny` and writes its model card: `python -m mmserve.evaluation.model_card`.

Accuracy is that of transformers' own greedy generation on held-out questions, so it judges the weights
and not this server. Verdicts are kept in a file as they come, so that a long measurement can go on.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import islice
from pathlib import Path

from mmserve.evaluation.card_text import CURVES, INTRODUCTION, LIMITS, RECIPE
from mmserve.evaluation.curves import curves_svg, read_log
from mmserve.evaluation.oracle import TransformersOracle, View, judge
from mmserve.evaluation.suites import SUITES, Verdict, examples
from mmserve.models.resolve import resolve

Measured = dict[tuple[str, View], list[Verdict]]
# questions per suite and view; needles are a third of clipworld-long
LIMITS_OF: dict[View, dict[str, int]] = {
    "all": {"clipworld-basic": 800, "clipworld-long": 600, "clipworld-mixed": 400, "clipworld-stream": 400},
    "carriers": {"clipworld-basic": 800, "clipworld-long": 360},
    "random": dict.fromkeys(SUITES, 180),
    "one-frame": dict.fromkeys(SUITES, 180),
    "blind": dict.fromkeys(SUITES, 180),
}
LENGTHS = ((1, 8), (9, 16), (17, 24), (25, 32), (33, 48), (64, 64))


def measure(oracle: TransformersOracle, file: Path, seed: int, scale: float) -> Measured:
    """Every verdict of `LIMITS_OF`, those in `file` taken from there."""
    measured: Measured = {}
    for view, suites in LIMITS_OF.items():
        for suite, limit in suites.items():
            verdicts = _known(file, suite, view)
            for example in islice(examples(suite, seed), len(verdicts), round(limit * scale)):
                (verdict,) = judge(oracle, [example], view)
                verdicts.append(verdict)
                row = {"suite": suite, "view": view, **{f: getattr(verdict, f) for f in verdict.__slots__}}
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
            measured[suite, view] = verdicts
    return measured


def _known(file: Path, suite: str, view: View) -> list[Verdict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [
        Verdict(row["kind"], row["frames"], row["depth"], row["right"])
        for row in rows
        if (row["suite"], row["view"]) == (suite, view)
    ]


def _share(verdicts: Sequence[Verdict]) -> str:
    return f"{sum(verdict.right for verdict in verdicts) / len(verdicts):.1%}" if verdicts else ""


def _grouped(
    verdicts: Iterable[Verdict], key: Callable[[Verdict], Hashable]
) -> dict[Hashable, list[Verdict]]:
    groups: dict[Hashable, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[key(verdict)].append(verdict)
    return groups


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _by_kind(measured: Measured, suite: str) -> list[str]:
    columns: tuple[View, ...] = ("all", "carriers", "random", "one-frame", "blind")
    columns = tuple(view for view in columns if (suite, view) in measured)
    by_view = {view: _grouped(measured[suite, view], lambda verdict: verdict.kind) for view in columns}
    titles = {"all": "whole prompt", "carriers": "carriers only", "random": "random 10 %"}
    lines = [
        _row("kind", "asked", *(titles.get(view, view) for view in columns)),
        _row(*["---"] * (len(columns) + 2)),
    ]
    for kind in sorted(by_view["all"], key=str):
        shares = [_share(by_view[view].get(kind, [])) for view in columns]
        lines.append(_row(kind, len(by_view["all"][kind]), *shares))
    totals = [f"**{_share(measured[suite, view])}**" for view in columns]
    lines.append(_row("**all**", len(measured[suite, "all"]), *totals))
    return lines


def _by_depth(measured: Measured) -> list[str]:
    lines = [_row("depth", "asked", "whole prompt", "carriers only"), _row(*["---"] * 4)]
    groups = [
        _grouped(
            (v for v in measured["clipworld-long", view] if v.kind == "needle" and v.depth is not None),
            lambda verdict: int(10 * (verdict.depth or 0)),
        )
        for view in ("all", "carriers")
    ]
    for decile in range(10):
        dense, carried = (group.get(decile, []) for group in groups)
        lines.append(
            _row(f"{decile / 10:.1f} to {(decile + 1) / 10:.1f}", len(dense), _share(dense), _share(carried))
        )
    return lines


def _by_length(measured: Measured) -> list[str]:
    videos = [
        verdict
        for suite in ("clipworld-basic", "clipworld-stream", "clipworld-long")
        for verdict in measured[suite, "all"]
    ]
    lines = [_row("frames", "asked", "whole prompt"), _row(*["---"] * 3)]
    for first, last in LENGTHS:
        inside = [verdict for verdict in videos if first <= verdict.frames <= last]
        if inside:
            lines.append(_row(f"{first} to {last}" if first != last else first, len(inside), _share(inside)))
    return lines


def card(measured: Measured, seed: int, history: str) -> str:
    parts = [INTRODUCTION.format(seed=seed)]
    for suite in SUITES:
        parts += [f"### {suite}\n", *_by_kind(measured, suite), ""]
    parts += ["### Needles of one frame in 64, by depth\n", *_by_depth(measured), ""]
    parts += ["### By length, over all suites of single videos\n", *_by_length(measured), ""]
    parts += [RECIPE, history, CURVES, LIMITS]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="checkpoint directory")
    parser.add_argument("--seed", type=int, default=1, help="suite seed")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of questions")
    parser.add_argument("--verdicts", required=True, help="file that keeps the verdicts")
    parser.add_argument("--log", action="append", default=[], help="training logs, oldest first")
    parser.add_argument("--history", help="a file with a paragraph on how these weights came about")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    measured = measure(TransformersOracle(folder), Path(arguments.verdicts), arguments.seed, arguments.scale)
    (folder / "curves.svg").write_text(curves_svg(read_log([Path(log) for log in arguments.log])))
    history = Path(arguments.history).read_text() if arguments.history else ""
    (folder / "README.md").write_text(card(measured, arguments.seed, history))


if __name__ == "__main__":
    main()
