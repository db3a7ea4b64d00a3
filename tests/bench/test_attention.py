"""`mmserve bench attention` on a small geometry: both sides compute the same where all is seen."""

from __future__ import annotations

import pytest
import torch

from mmserve.attention.base import Skipping, make_pattern
from mmserve.bench import attention as bench
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import prefill_attention


def test_rows_say_what_was_measured() -> None:
    plan = bench.Plan(options={"sink": 8, "local": 64}, geometry="nano", tokens=(800,), rounds=1)
    told: list[str] = []
    report = bench.run(plan, told.append)
    whole, index = report["rows"]
    assert (report["bench"], whole["metric"], index["metric"]) == (
        "attention",
        "attention_800",
        "attention_800_index",
    )
    assert whole["ratio"] > 0
    assert 0 < whole["density"] < 1
    assert 0 < whole["recall"] <= 1
    assert index["ours"] < whole["ours"]
    assert len(told) == 2


def test_both_sides_compute_the_same_where_all_is_seen() -> None:
    plan = bench.Plan(geometry="nano", tokens=(600,))
    prompt = bench.planted(plan, 600)
    pattern = make_pattern("mminference", local=10**6)
    for view in bench.views(prompt):
        index = pattern.index(view)
        assert index is not None
        assert not isinstance(index, Skipping)
        found = prefill_attention(view.queries, view.keys, view.values, index, scale=view.scale).out
        torch.testing.assert_close(found, bench.dense_chunk(prompt, view), atol=2e-2, rtol=2e-2)


def test_wrong_plans_are_refused() -> None:
    with pytest.raises(BadRequest, match="Expected"):
        bench.Plan(tokens=(5,))
    with pytest.raises(BadRequest, match="Expected"):
        bench.Plan(options={"nothing": 1})
    with pytest.raises(BadRequest, match="Expected numbers"):
        bench.read_tokens("1,x")
