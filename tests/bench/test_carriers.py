"""The benchmark of carriers on a very small model, and how it judges what it finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmserve import cli
from mmserve.bench import carriers
from mmserve.bench.carriers import Plan, measure, run
from mmserve.bench.side import Job, Outcome, SideConfig, make_worker
from mmserve.errors import BadRequest


@contextmanager
def local(name: str, config: SideConfig) -> Iterator[Any]:
    """A side in this process, which has the libraries loaded already."""
    side = make_worker(name, config)
    try:
        yield side
    finally:
        side.close()


def test_one_slot_of_a_frame_stays(tmp_path: Path) -> None:
    plan = Plan(geometry="nano", frames=(2, 5), rounds=1, threads=1, cache_dir=tmp_path)
    report = json.loads(json.dumps(run(plan, local)))
    assert report["bench"] == "carriers"
    rows = {row["metric"]: row for row in report["rows"]}
    assert list(rows) == ["decode_5_frames", "kv_slots_per_frame", "kv_per_hour"]
    assert rows["decode_5_frames"]["peer"] > 0
    assert (rows["kv_slots_per_frame"]["ours"], rows["kv_slots_per_frame"]["passed"]) == (1.0, True)
    # of all tokens of a frame one is left
    assert rows["kv_per_hour"]["ratio"] == 4


class Scripted:
    """Answers at once: a longer video slows a step down and keeps more slots, as it is told to."""

    def __init__(self, slowdown: float, slots: int) -> None:
        self._slowdown, self._slots = slowdown, slots

    def run(self, job: Job) -> Outcome:
        frames = job.asks[0].frames
        tokens = frames * 100 + 10
        return Outcome(
            seconds=0.01 * (self._slowdown if frames > 32 else 1.0),
            prompt_tokens=tokens,
            kv_bytes=4 * (frames * self._slots + 10),
            kv_bytes_dense=4 * tokens,
        )

    def peak_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(("slowdown", "slots", "passed"), [(1.05, 1, [True, True]), (1.2, 2, [False, False])])
def test_gates_are_one_slot_and_a_tenth_of_a_step(slowdown: float, slots: int, passed: list[bool]) -> None:
    told: list[str] = []
    rows = measure(Plan(rounds=2), Scripted(slowdown, slots), told.append)
    assert [row["passed"] for row in rows if "passed" in row] == passed
    assert rows[1]["ours"] == slots
    assert rows[2]["peer"] == pytest.approx(100 * 4 * 7200 / 2**20, rel=1e-3)
    assert len(told) == 2 + 4


@pytest.mark.parametrize(
    "wrong", [{"frames": (32, 32)}, {"frames": (0, 5)}, {"geometry": "ov-huge"}], ids=str
)
def test_a_wrong_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="Expected"):
        Plan(**wrong)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plans: list[Plan] = []

    def fake(plan: Plan, tell: object) -> dict[str, Any]:
        plans.append(plan)
        return {"bench": "carriers", "rows": []}

    monkeypatch.setattr(carriers, "run", fake)
    monkeypatch.setattr(sys, "argv", ["mmserve", "bench", "carriers", "--frames", "8,64", "--json", "-"])
    assert cli.main() == 0
    assert json.loads(capsys.readouterr().out)["bench"] == "carriers"
    assert plans[0].frames == (8, 64)
    monkeypatch.setattr(sys, "argv", ["mmserve", "bench", "carriers", "--frames", "8"])
    assert cli.main() == 2
