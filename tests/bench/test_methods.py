"""The benchmark of methods on a very small model, and how it judges what it finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmserve import cli
from mmserve.bench import methods
from mmserve.bench.methods import GATED, Plan, run
from mmserve.bench.side import Job, Outcome, Side, SideConfig, make_worker
from mmserve.errors import BadRequest
from mmserve.request import Methods


@contextmanager
def local(name: str, config: SideConfig) -> Iterator[Any]:
    """A side in this process, which has the libraries loaded already."""
    side = make_worker(name, config)
    try:
        yield side
    finally:
        side.close()


def test_the_whole_bench(tmp_path: Path) -> None:
    plan = Plan(
        methods=Methods(prune="holitom", keep=0.5),
        geometry="nano",
        rounds=1,
        frames=2,
        tokens=2,
        threads=1,
        cache_dir=tmp_path,
    )
    report = json.loads(json.dumps(run(plan, local)))
    assert report["bench"] == "methods"
    assert report["settings"]["methods"]["prune"] == "holitom"
    rows = {row["metric"]: row for row in report["rows"]}
    assert list(rows) == ["ttft_cold", "ttft_warm", "saved_to_prune", "decode_8", "throughput_16"]
    assert all(row["peer"] > 0 for row in rows.values())
    assert "gate" not in rows["ttft_cold"]  # only the setting that the paper's figures are about has them
    assert "gate" not in rows["throughput_16"]


class Scripted:
    """Answers at once; remembers jobs."""

    def __init__(self, seconds: float, prune_ms: float = 0.0) -> None:
        self.outcome = Outcome(seconds=seconds, prune_ms=prune_ms)
        self.jobs: list[Job] = []

    def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        return self.outcome

    def peak_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to close."""


def scripted(
    monkeypatch: pytest.MonkeyPatch, ours: Scripted, dense: Scripted, plan: Plan
) -> dict[str, dict[str, Any]]:
    monkeypatch.setattr(methods, "checkpoint", lambda *_: "somewhere")

    def opened(name: str, config: SideConfig) -> AbstractContextManager[Side]:
        @contextmanager
        def side() -> Iterator[Side]:
            yield dense if config.methods == Methods() else ours

        return side()

    return {row["metric"]: row for row in run(plan, opened)["rows"]}


def test_gates_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scripted(monkeypatch, Scripted(1.0, prune_ms=20.0), Scripted(2.0), Plan(methods=GATED, rounds=2))
    assert {name: row["passed"] for name, row in rows.items()} == {
        "ttft_cold": False,
        "ttft_warm": False,
        "saved_to_prune": True,  # a second for 20 ms
        "decode_8": True,
        "throughput_16": True,
    }
    assert rows["saved_to_prune"]["ratio"] == 50.0


def test_the_warm_video_is_the_cold_one_behind_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, dense = Scripted(1.0), Scripted(1.0)
    scripted(monkeypatch, ours, dense, Plan(methods=GATED, rounds=2, metrics=("ttft",)))
    asks = [job.asks[0] for job in ours.jobs[1:]]  # behind the warm-up
    assert [ask.prefix for ask in asks] == [0, 0, 1, 1]
    assert asks[0].video == asks[2].video != asks[1].video == asks[3].video
    assert ours.jobs == dense.jobs


def test_other_methods_have_no_figures_to_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(methods=Methods(kv="snapkv", kv_budget=0.25), rounds=1)
    rows = scripted(monkeypatch, Scripted(1.0), Scripted(1.0), plan)
    assert [name for name, row in rows.items() if "gate" in row] == ["throughput_16"]
    assert "saved_to_prune" not in rows


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prune": "fastv", "keep": 0.5}, ["ttft_cold", "ttft_warm", "throughput_16"]),
        ({"prune": "holitom+fastv", "keep": 0.5}, ["ttft_cold", "ttft_warm", "throughput_16"]),
        (
            {"prune": "carriers", "prune_options": {"memory": 8}},
            ["ttft_cold", "ttft_warm", "saved_to_prune", "throughput_16"],
        ),
        ({"prune": "carriers"}, ["ttft_cold", "ttft_warm", "saved_to_prune", "decode_8", "throughput_16"]),
    ],
    ids=str,
)
def test_what_would_compare_unlike_things_is_left_out(
    given: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(methods=Methods(**given), rounds=1)
    assert list(scripted(monkeypatch, Scripted(1.0), Scripted(2.0), plan)) == expected


@pytest.mark.parametrize(
    "wrong", [{"methods": Methods()}, {"geometry": "ov-huge"}, {"metrics": ("speed",)}], ids=str
)
def test_a_wrong_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="Expected a"):
        Plan(**({"methods": GATED} | wrong))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plans: list[Plan] = []

    def fake(plan: Plan, tell: object) -> dict[str, Any]:
        plans.append(plan)
        return {"bench": "methods", "rows": []}

    monkeypatch.setattr(methods, "run", fake)
    given = ["--prune", "holitom", "--keep", "0.1", "--metrics", "decode", "--json", "-"]
    monkeypatch.setattr(sys, "argv", ["mmserve", "bench", "methods", *given])
    assert cli.main() == 0
    assert json.loads(capsys.readouterr().out)["bench"] == "methods"
    assert plans[0].methods == GATED
    assert plans[0].metrics == ("decode",)
    monkeypatch.setattr(sys, "argv", ["mmserve", "bench", "methods"])
    assert cli.main() == 2
