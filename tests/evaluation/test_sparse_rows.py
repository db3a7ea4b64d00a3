"""Rows of an evaluation about sparse attention: settings of several patterns, density, recall, arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from mmserve.errors import BadRequest
from mmserve.evaluation import report, run
from mmserve.evaluation.report import Geometry, Outcome
from mmserve.generation import Deliver
from mmserve.request import Chunk, MediaOptions, Methods, RequestOutput, Timings, Usage
from mmserve.sampling import SamplingParams
from tests.fake_llm import FakeGeneration, FakeLLM

GEOMETRY = Geometry(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2)
SPARSE = Methods(attention="a_shape", attention_options={"sink": 4}, attention_dense_below=0)


class Measuring(FakeLLM):
    """Says that a tenth is computed, and half of the weight seen where somebody asks."""

    def submit(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams,
        *,
        deliver: Deliver,
        methods: Methods | None = None,
        options: MediaOptions | None = None,
        report_tokens: bool = False,
        report_attention: bool = False,
    ) -> FakeGeneration:
        def measured(news: Chunk | RequestOutput | Exception) -> None:
            if isinstance(news, RequestOutput):
                recall = (1.0, 0.0) if report_attention else ()
                usage = msgspec.structs.replace(
                    news.usage, attention_density=(0.15, 0.05), attention_recall=recall
                )
                news = msgspec.structs.replace(news, usage=usage)
            deliver(news)  # type: ignore[arg-type]  # what came goes on

        return super().submit(messages, sampling_params, deliver=measured, methods=methods, options=options)


def sweep(attention: str, options: dict[str, Any], below: int | None = None) -> list[Methods]:
    return list(
        run.sweep(
            prune="none",
            keep=None,
            attention=attention,
            attention_options=options,
            attention_dense_below=below,
            kv="none",
            kv_budget=None,
            kv_dtype="auto",
        )
    )


def test_patterns_of_a_sweep_get_the_settings_that_they_have() -> None:
    given = {"sink": 4, "tri_shape.local": 9, "local_frames": 2, "reuse_every": 3}
    dense, a_shape, tri_shape = sweep("a_shape,tri_shape", given, below=0)
    assert dense == Methods()
    assert a_shape.attention_options == {"sink": 4, "local_frames": 2, "reuse_every": 3}
    assert tri_shape.attention_options.items() >= {"sink": 4, "local": 9, "reuse_every": 3}.items()
    assert a_shape.attention_dense_below == tri_shape.attention_dense_below == 0


@pytest.mark.parametrize("options", [{"sinc": 4}, {"tri_shape.local": 9}])
def test_a_setting_of_no_pattern_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="Expected settings of dense, a_shape"):
        sweep("dense,a_shape", options)


def test_density_and_recall_are_in_the_row() -> None:
    plan = run.Plan(suites=("clipworld-basic",), sweep=(Methods(), SPARSE), limit=3)
    opened: list[Methods] = []

    def open_llm(methods: Methods) -> FakeLLM:
        opened.append(methods)
        return Measuring(methods=methods)

    dense, sparse = run.evaluate(plan, open_llm, GEOMETRY)
    # what is timed does not measure what is lost
    assert opened == [Methods(), SPARSE, SPARSE]
    assert (dense["attention_density"], dense["attention_recall"]) == (1.0, 1.0)
    assert (sparse["attention_density"], sparse["attention_recall"]) == (0.1, 0.5)
    assert sparse["flops_ratio"] == 1.0
    table = report.markdown([dense, sparse])
    assert "| a_shape, sink 4 |" in table
    assert " 10 % | 50 % |" in table


def outcome(prompt: int, cached: int, density: tuple[float, ...]) -> Outcome:
    usage = Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=2, attention_density=density)
    return Outcome(
        question_id="q", kind="k", clip="c", correct=True, usage=usage, timings_ms=Timings(ttft=1.0)
    )


def test_a_question_counts_by_the_rows_that_it_ran() -> None:
    ran, cached = outcome(1000, 0, (0.1, 0.3)), outcome(1000, 990, (1.0, 1.0))
    dense = [outcome(1000, 0, (1.0, 1.0)), outcome(1000, 990, (1.0, 1.0))]
    row = report.row("s", SPARSE, [ran, cached], dense, GEOMETRY, 0.75)
    assert row["attention_density"] == pytest.approx((0.2 * 1000 + 10) / 1010, abs=1e-4)
    assert row["attention_recall"] == 0.75
    pairs = GEOMETRY.prefill_flops([1000, 1000]) - GEOMETRY.prefill_flops([1000, 1000], [0.1, 0.3])
    assert pairs == pytest.approx(1.6 * 4 * 2 * 2 * 1000 * 1001 / 2)
    assert row["flops_ratio"] < 0.7
