"""Rounds in turn, paired ratios, gates, and the table."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from mmserve.bench.pairing import Measure, Metric, alternate, row
from mmserve.bench.report import document, table


def test_sides_take_turns() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, base: float) -> Measure:
        def measure(number: int) -> float:
            calls.append((name, number))
            return base + number

        return measure

    assert alternate({"a": side("a", 1), "b": side("b", 10)}, 2) == {"a": [1, 2], "b": [10, 11]}
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    ours, peer = [1.0, 10.0, 2.0], [4.0, 10.0, 5.0]  # the machine was slow in the second round
    found = row(Metric(name="ttft", unit="ms"), ours, peer)
    assert found["ratio"] == 2.5
    assert (found["ours"], found["peer"], found["runs"]) == (2.0, 5.0, 3)
    assert found["samples"] == {"ours": ours, "peer": peer}


def test_above_one_is_a_win_whatever_is_measured() -> None:
    assert row(Metric(name="a", unit="ms"), [1.0], [2.0])["ratio"] == 2.0
    assert row(Metric(name="a", unit="requests/s", more_is_better=True), [2.0], [1.0])["ratio"] == 2.0


@pytest.mark.parametrize(("peer", "passed"), [(1.24, False), (1.25, True), (1.26, True)])
def test_a_gate_is_the_least_ratio(peer: float, passed: bool) -> None:
    found = row(Metric(name="ttft", unit="ms", gate=1.25, goal=2.0), [1.0], [peer])
    assert (found["gate"], found["goal"], found["passed"]) == (1.25, 2.0, passed)


def test_without_a_peer_there_is_nothing_to_pass() -> None:
    found = row(Metric(name="ttft", unit="ms", gate=1.25), [1.0])
    assert (found["peer"], found["ratio"]) == (None, None)
    assert "gate" not in found
    assert "passed" not in found


def test_a_report_is_json_and_a_table() -> None:
    metric = Metric(name="shared", unit="requests/s", more_is_better=True, gate=6.0)
    rows = [row(metric, [3.0], [1.0], scaled_from=4), row(Metric(name="ttft", unit="ms"), [12.0])]
    report = json.loads(json.dumps(document("engine", {"rounds": 1}, rows)))
    assert report.keys() == {"bench", "machine", "commit", "settings", "rows"}
    assert report["rows"][0]["scaled_from"] == 4
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(report["rows"]))
    _, shared, ttft = captured.get().splitlines()
    assert shared.split() == ["shared", "3", "requests/s", "1", "3", "6", "missed", "-", "1"]
    assert ttft.split() == ["ttft", "12", "ms", "-", "-", "-", "-", "1"]
