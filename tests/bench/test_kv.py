"""The benchmark of smaller KV on a very small model, and its counts for the model it is judged on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmserve import cli
from mmserve.bench import kv
from mmserve.bench.kv import Plan, read_budgets, run
from mmserve.errors import BadRequest


def test_every_metric_has_a_row_for_every_type_and_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "STEPS", 2)
    plan = Plan(
        dtypes=("bf16", "int8"),
        budgets=(1.0, 0.5),
        geometry="nano",
        context=100,
        batch=2,
        rounds=1,
        cache_dir=tmp_path,
    )
    rows = json.loads(json.dumps(run(plan)))["rows"]
    cells = ("bf16_0.5", "int8", "int8_0.5")
    assert [row["metric"] for row in rows] == [f"{name}_{cell}" for name in kv.METRICS for cell in cells]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
    assert all("gate" not in row for row in rows)


def test_memory_and_handoff_pass_their_gates() -> None:
    """Counted, not measured: whole pages with scales, newest pages and room for answers; bytes of leases."""
    plan = Plan(dtypes=("bf16", "int8", "int4"), budgets=(1.0, 0.25), metrics=("capacity", "handoff"))
    rows = {row["metric"]: row for row in run(plan)["rows"]}
    gated = {name: row["gate"] for name, row in rows.items() if "gate" in row}
    assert gated == {
        f"{name}_{cell}": gate
        for name in ("capacity", "handoff")
        for cell, gate in {"bf16_0.25": 3.5, "int8": 1.85, "int4": 3.2, "int4_0.25": 11.0}.items()
    }
    assert all(rows[name]["passed"] for name in gated)


@pytest.mark.parametrize(
    "wrong", [{"dtypes": ("int3",)}, {"budgets": (0.0,)}, {"metrics": ("speed",)}, {"geometry": "huge"}]
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(BadRequest):
        Plan(**wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_budgets_are_read_from_a_list() -> None:
    assert read_budgets("1,0.5,1") == (1.0, 0.5)
    with pytest.raises(BadRequest):
        read_budgets("half")
    assert CliRunner().invoke(cli.app, ["bench", "kv", "--kv-dtype", "int3"]).exit_code == 2
