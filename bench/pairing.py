"""Runs the sides of a benchmark in turn and makes rows of what they took.

A machine's speed drifts, so the sides alternate, A B A B, and only runs that are neighbours in time are
compared: a row's ratio is the median over the rounds. Knows nothing about what is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Json = dict[str, Any]
Measure = Callable[[int], float]  # from a round's number to what it took


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a row is about. Ratios are always better-than-peer: `gate` is the least one that passes."""

    name: str
    unit: str
    more_is_better: bool = False
    gate: float | None = None
    goal: float | None = None


def alternate(sides: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Every side once per round, always in the same order."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            taken[name].append(measure(number))
    return taken


def alternate_telling(
    name: str, sides: Mapping[str, Measure], rounds: int, tell: Callable[[str], None]
) -> dict[str, list[float]]:
    """The same; `tell` gets a line whenever a side has been measured."""

    def told(side: str, measure: Measure) -> Measure:
        def run(number: int) -> float:
            found = measure(number)
            tell(f"{name} {number + 1}/{rounds} {side}: {found:.4g}")
            return found

        return run

    return alternate({side: told(side, measure) for side, measure in sides.items()}, rounds)


def row(metric: Metric, ours: Sequence[float], peer: Sequence[float] | None = None, **notes: object) -> Json:
    """One row of a report. `notes` say how a figure came about; without a peer there is no ratio."""
    found: Json = {
        "metric": metric.name,
        "unit": metric.unit,
        "ours": _rounded(median(ours)),
        "peer": None,
        "ratio": None,
        "runs": len(ours),
        "samples": {"ours": [_rounded(value) for value in ours]},
        **notes,
    }
    if peer is None:
        return found
    pairs = zip(ours, peer, strict=True)
    ratio = median(a / b if metric.more_is_better else b / a for a, b in pairs)
    found |= {"peer": _rounded(median(peer)), "ratio": _rounded(ratio)}
    found["samples"]["peer"] = [_rounded(value) for value in peer]
    if metric.goal is not None:
        found["goal"] = _rounded(metric.goal)
    if metric.gate is not None:
        found |= {"gate": _rounded(metric.gate), "passed": ratio >= metric.gate}
    return found


def _rounded(value: float) -> float:
    """Four digits: no measurement here repeats better."""
    return float(f"{value:.4g}")
