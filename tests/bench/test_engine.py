"""The whole engine benchmark on a very small model: what it asks, checks and reports."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mmserve import cli
from mmserve.bench import engine
from mmserve.bench.engine import Plan, run
from mmserve.bench.memory import peak_bytes
from mmserve.bench.side import Job, Outcome, Side, SideConfig, make_worker
from mmserve.errors import BadRequest, MMServeError

ROWS = (
    "ttft second batch_vs_one_by_one batch_vs_padded shared_vs_one_by_one "
    "decode_1 decode_16 memory_1 memory_16"
)


class LocalSide:
    """A side in this process, which has the libraries loaded already."""

    def __init__(self, name: str, config: SideConfig) -> None:
        self._worker = make_worker(name, config)

    def run(self, job: Job) -> Outcome:
        return self._worker.run(job)

    def peak_bytes(self) -> int:
        return peak_bytes(os.getpid())

    def close(self) -> None:
        self._worker.close()


@contextmanager
def local(name: str, config: SideConfig) -> Iterator[Side]:
    side = LocalSide(name, config)
    try:
        yield side
    finally:
        side.close()


def test_the_whole_bench(tmp_path: Path) -> None:
    told: list[str] = []
    plan = Plan(
        geometry="nano", vs="transformers", rounds=1, frames=2, tokens=2, threads=1, cache_dir=tmp_path
    )
    report = json.loads(json.dumps(run(plan, local, told.append)))
    assert report["bench"] == "engine"
    assert report["settings"]["geometry"] == "nano"
    assert {"machine", "commit", "rows", "checks"} <= report.keys()
    rows = {row["metric"]: row for row in report["rows"]}
    assert " ".join(rows) == ROWS
    for row in rows.values():
        assert {"metric", "unit", "ours", "peer", "ratio", "runs"} <= row.keys()
        assert min(row["ours"], row["peer"], row["ratio"]) > 0
        assert row["runs"] == 1
        assert "gate" not in row  # only the geometry that the gates are about has them
    assert rows["shared_vs_one_by_one"]["scaled_from"] == 4
    exact, fast = report["checks"]
    assert exact["max_abs_difference"] <= exact["tolerance"]
    assert fast["max_abs_difference"] <= fast["tolerance"]
    assert any(line.startswith("ttft 1/1 ours") for line in told)


class Scripted:
    """Answers at once; counts jobs."""

    def __init__(self, seconds: float, logprob: float = -1.0) -> None:
        self.seconds = seconds
        self.outcome = Outcome(
            seconds=seconds, token_ids=(1,), candidates={1: logprob}, prompt_logprobs=(logprob,)
        )
        self.jobs: list[Job] = []

    def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        return self.outcome

    def peak_bytes(self) -> int:
        return int(self.seconds * 2**20)

    def close(self) -> None:
        """Nothing to close."""


class Sides:
    """Opens the same two scripted sides again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ours: Scripted, peer: Scripted) -> None:
        self.sides = {"mmserve": ours, "transformers": peer}
        self.configs: list[SideConfig] = []
        monkeypatch.setattr(engine, "checkpoint", lambda *_: "somewhere")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def __call__(self, name: str, config: SideConfig) -> AbstractContextManager[Side]:
        self.configs.append(config)

        @contextmanager
        def opened() -> Iterator[Side]:
            yield self.sides[name]

        return opened()


def test_gates_are_judged_on_paired_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(monkeypatch, Scripted(1.0), Scripted(3.0))
    rows = {row["metric"]: row for row in run(Plan(vs="transformers", rounds=2), sides)["rows"]}
    assert {name: row["passed"] for name, row in rows.items() if "gate" in row} == {
        "ttft": True,
        "second": False,
        "batch_vs_one_by_one": True,  # 16 in a second against 4 in three
        "batch_vs_padded": True,
        "shared_vs_one_by_one": True,
        "decode_16": True,
        "memory_1": True,
        "memory_16": True,
    }
    assert rows["ttft"]["ratio"] == 3.0
    assert rows["batch_vs_one_by_one"]["ratio"] == 12.0
    assert rows["shared_vs_one_by_one"]["ratio"] == 24.0
    assert rows["decode_1"]["goal"] == 2.0


def test_other_lengths_have_no_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(monkeypatch, Scripted(1.0), Scripted(3.0))
    rows = run(Plan(vs="transformers", rounds=1, frames=8), sides)["rows"]
    assert not any("gate" in row for row in rows)


def test_both_sides_are_asked_the_same_and_never_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, peer = Scripted(1.0), Scripted(1.0)
    run(Plan(vs="transformers", rounds=2, metrics=("ttft", "batch")), Sides(monkeypatch, ours, peer))
    assert [job for job in peer.jobs if len(job.asks) != 4] == ours.jobs
    seen = [ask.video for job in ours.jobs for ask in job.asks]
    assert len(set(seen)) == len(seen)


def test_our_side_has_answered_the_first_question_before_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, peer = Scripted(1.0), Scripted(1.0)
    run(Plan(vs="transformers", rounds=1, metrics=("second",)), Sides(monkeypatch, ours, peer))
    first, second = (job.asks[0] for job in ours.jobs[-2:])
    assert (first.video, first.question, second.question) == (second.video, 0, 1)
    assert peer.jobs[-1].asks == (second,)


def test_without_a_peer_only_ours_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(monkeypatch, Scripted(1.0), Scripted(1.0))
    report = run(Plan(rounds=1), sides)
    assert all(row["peer"] is row["ratio"] is None for row in report["rows"])
    assert [row["metric"] for row in report["rows"]][2:4] == ["batch", "shared"]
    assert report["checks"] == []


def test_no_speed_is_reported_for_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(monkeypatch, Scripted(1.0), Scripted(9.0, logprob=-2.0))
    with pytest.raises(MMServeError, match="no speed"):
        run(Plan(vs="transformers", rounds=1), sides)


def test_numbers_are_compared_in_fp32_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(monkeypatch, Scripted(1.0), Scripted(1.0))
    run(Plan(vs="transformers", rounds=1, metrics=("ttft",)), sides)
    assert [config.dtype for config in sides.configs] == ["float32", "float32", "auto", "auto"]


@pytest.mark.parametrize(
    "wrong",
    [{"geometry": "ov-huge"}, {"metrics": ("speed",)}, {"vs": "somebody"}],
    ids=lambda w: next(iter(w)),
)
def test_a_wrong_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="Expected a"):
        Plan(**wrong)


# the command line


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mmserve", "bench", "engine", *arguments])
    return cli.main()


def test_json_goes_to_stdout_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plans: list[Plan] = []

    def fake(plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
        plans.append(plan)
        tell("half way")
        return {"bench": "engine", "rows": []}

    monkeypatch.setattr(engine, "run", fake)
    assert bench(monkeypatch, "--vs", "transformers", "--metrics", "ttft,decode", "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"bench": "engine", "rows": []}
    assert "half way" in printed.err
    assert plans[0].metrics == ("ttft", "decode")
    assert bench(monkeypatch, "--json", str(tmp_path / "report.json")) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "report.json").read_text())["bench"] == "engine"


@pytest.mark.parametrize(
    "arguments", [["--vs", "somebody"], ["--geometry", "ov-huge"], ["--metrics", "speed"], ["--rounds", "0"]]
)
def test_wrong_usage_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert bench(monkeypatch, *arguments) == 2
    assert "nvalid value" in capsys.readouterr().err
