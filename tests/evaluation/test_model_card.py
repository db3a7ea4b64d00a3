"""The model card: tables from verdicts, curves from logs, and measurements that go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest

from mmserve.evaluation import model_card
from mmserve.evaluation.curves import curves_svg, read_log
from mmserve.evaluation.model_card import LIMITS_OF, Measured, card, measure
from mmserve.evaluation.oracle import TransformersOracle, View
from mmserve.evaluation.suites import Example, Verdict


def verdicts(kind: str, right: int, asked: int, frames: int = 8) -> list[Verdict]:
    return [Verdict(kind, frames, index / asked, index < right) for index in range(asked)]


def test_a_card_holds_accuracy_by_suite_kind_length_and_depth() -> None:
    measured: Measured = {}
    for view, suites in LIMITS_OF.items():
        for suite in suites:
            measured[suite, view] = verdicts("colour", 3, 4)
    measured["clipworld-long", "all"] = verdicts("needle", 5, 10, 64)
    text = card(measured, 1, "How they came about.\n")
    assert "| needle | 10 | 50.0% |" in text
    assert "| colour | 4 | 75.0% | 75.0% |" in text
    assert "| 0.0 to 0.1 | 1 | 100.0% |" in text
    assert "| 0.9 to 1.0 | 1 | 0.0% |" in text
    assert "| 64 | 10 | 50.0% |" in text
    assert "How they came about." in text


def test_a_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def judge(_: TransformersOracle, examples: Iterable[Example], view: View) -> list[Verdict]:
        asked.extend(f"{view} {example.example_id}" for example in examples)
        return [Verdict("colour", 8, None, True)]

    monkeypatch.setattr(model_card, "judge", judge)
    monkeypatch.setattr(model_card, "LIMITS_OF", {"all": {"clipworld-basic": 3}})
    file, oracle = tmp_path / "verdicts.jsonl", cast(TransformersOracle, None)
    first = measure(oracle, file, 1, 1.0)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n")
    asked.clear()
    assert measure(oracle, file, 1, 1.0) == first
    assert asked == ["all clipworld-basic-1-00002"]


def test_curves_of_runs_one_after_the_other(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "phase": "long",
            "step": step,
            "seconds": 1800.0 * step,
            "clip": 0.5,
            "clip+": 0.7,
            "clip probe": 9.0,
        }
        for step in (1, 2)
    ]
    logs = [tmp_path / "one", tmp_path / "two"]
    for log in logs:
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = read_log(logs)
    assert curves["clip"] == [(0.5, 0.5), (1.0, 0.5), (1.5, 0.5), (2.0, 0.5)]
    assert set(curves) == {"clip", "clip+"}
    picture = curves_svg(curves)
    assert picture.count("<polyline") == 2
    assert "clip (carriers)" in picture
