"""Small random models against transformers in fp32: what prompts are worth, and greedy answers to them.

Whatever the chunks are, from the prefix cache, and in one process or three.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from mmserve.engine.batch import StepResult
from mmserve.engine.rows import DecodeRow
from mmserve.engine.runner import Runner
from mmserve.engine.scheduler import Plan
from mmserve.llm import LLM
from mmserve.request import SEGMENT_FRAMES, RequestOutput
from mmserve.sampling import SamplingParams

from .random_models import RandomOracle, RandomRequest, random_model, random_requests

TOKENS = 32
TOLERANCE = 2e-3  # of log-probabilities
TIE = 1e-3  # logits closer than this may change places
KV_MEMORY = 64 << 20
UNLIMITED = 1 << 20


def _seeds(seeds: Iterable[int], quick: Collection[int]) -> list[ParameterSet]:
    return [pytest.param(seed, marks=() if seed in quick else pytest.mark.slow) for seed in seeds]


class Case:
    """A random model on disk, requests to it, and who knows the answers."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._folder = folder
        self.oracle: RandomOracle = random_model(seed, folder)
        self.requests: list[RandomRequest] = random_requests(seed, self.oracle.config)

    def run(self, *, rows: int | None = None, epd: tuple[int, int, int] | None = None) -> LLM:
        """A pipeline with at most so many rows a step."""
        return LLM(
            str(self._folder),
            dtype="float32",
            threads=1,
            kv_memory=KV_MEMORY,
            max_num_batched_tokens=rows,
            epd=epd,
        )

    def check(self, outputs: Sequence[RequestOutput]) -> None:
        for request, output in zip(self.requests, outputs, strict=True):
            _check(self.oracle, request, output)
        said = {token for output in outputs for token in output.outputs[0].token_ids}
        assert len(said) > TOKENS, "constant answers would prove little"


@pytest.fixture
def case(seed: int, tmp_path: Path) -> Case:
    return Case(seed, tmp_path)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Prompt rows per chunk of every step that this process runs."""
    seen: list[list[int]] = []
    run = Runner.run

    def watched(runner: Runner, plan: Plan, decodes: dict[str, DecodeRow]) -> StepResult:
        seen.append([chunk.stop - chunk.start for chunk in plan.chunks])
        return run(runner, plan, decodes)

    monkeypatch.setattr(Runner, "run", watched)
    return seen


def _ask(llm: LLM, requests: Sequence[RandomRequest], *, prompt_logprobs: int | None) -> list[RequestOutput]:
    """All requests at once."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=prompt_logprobs)
    prompts = [
        {
            "prompt_token_ids": request.token_ids,
            "multi_modal_data": {"video": request.videos, "image": request.images},
        }
        for request in requests
    ]
    return llm.generate(prompts, params)


def _check(oracle: RandomOracle, request: RandomRequest, output: RequestOutput) -> None:
    answer = output.outputs[0]
    assert len(answer.token_ids) == TOKENS
    expected = oracle.expected(request, answer.token_ids)
    assert output.prompt_token_ids == expected.prompt_ids
    if output.prompt_logprobs is not None:
        assert output.prompt_logprobs[0] is None
        found = [
            entry[token].logprob if entry is not None else None
            for token, entry in zip(expected.prompt_ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        assert found == pytest.approx(expected.prompt_logprobs.tolist(), abs=TOLERANCE)
    assert answer.logprobs is not None
    rows = zip(answer.token_ids, answer.logprobs, expected.logits, strict=True)
    for step, (token, logprobs, logits) in enumerate(rows):
        best = int(logits.argmax())
        if token != best:
            assert logits[best] - logits[token] < TIE, f"token {step} is {token}, but {best} is better"
            return
        assert logprobs[token].logprob == pytest.approx(float(logits.log_softmax(-1)[best]), abs=TOLERANCE)


@pytest.mark.parametrize("seed", _seeds(range(20), quick=(5, 16, 18, 19)))
def test_mixed_requests_to_a_random_model_agree_with_transformers(case: Case) -> None:
    for request in case.requests:
        for frame in request.some_frames:
            assert case.oracle.sensitivity(request, frame) > 0.1, "a wrong frame would go unnoticed"
    with case.run() as llm:
        outputs = _ask(llm, case.requests, prompt_logprobs=0)
        again = _ask(llm, case.requests, prompt_logprobs=None)
    case.check(outputs)
    case.check(again)
    # prompts whose log-probabilities are wanted are never taken from the cache
    assert not any(output.usage.cached_tokens for output in outputs)
    assert all(output.usage.cached_tokens for output in again if len(output.prompt_token_ids) > 32)


@pytest.mark.parametrize("seed", _seeds(range(20), quick=(16,)))
@pytest.mark.parametrize("rows", [7, 64, UNLIMITED])
def test_a_random_model_in_chunks_agrees_with_transformers(
    case: Case, rows: int, chunks: list[list[int]]
) -> None:
    with case.run(rows=rows) as llm:
        case.check(_ask(llm, case.requests, prompt_logprobs=0))
    assert max(map(sum, chunks)) <= rows
    if rows == UNLIMITED:
        # cut only where media were not encoded any further yet
        parts = sum(
            len(request.images) + sum(-(-len(video) // SEGMENT_FRAMES) for video in request.videos)
            for request in case.requests
        )
        assert sum(map(len, chunks)) <= len(case.requests) + parts


@pytest.mark.parametrize("seed", _seeds(range(20), quick=(16,)))
def test_a_random_model_row_by_row_agrees_with_transformers(case: Case, chunks: list[list[int]]) -> None:
    with case.run(rows=1) as llm:
        case.check(_ask(llm, case.requests, prompt_logprobs=0))
    assert max(map(sum, chunks)) == 1


@pytest.mark.parametrize("seed", _seeds(range(20), quick=(4,)))
def test_a_random_model_in_three_processes_agrees_with_transformers(case: Case) -> None:
    with case.run(epd=(1, 1, 1)) as llm:
        case.check(_ask(llm, case.requests, prompt_logprobs=0))
        case.check(_ask(llm, case.requests, prompt_logprobs=None))
