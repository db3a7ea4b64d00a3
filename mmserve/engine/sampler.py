"""From logits to the next token. A draw depends only on (seed, step), never on the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmserve.sampling import Logprob, SamplingParams

MIN_TEMPERATURE = 1e-5  # below it fp32 overflows and the draw is greedy anyway


def sample(logits: Tensor, params: SamplingParams, step: int) -> tuple[int, dict[int, Logprob] | None]:
    """Choose token number `step` of an answer from fp32 `logits` [V], with the log-probabilities asked for.

    Log-probabilities are those of the model, before temperature and truncation (as in vLLM).
    """
    token = int(logits.argmax()) if params.temperature == 0 else _draw(logits, params, step)
    return token, None if params.logprobs is None else _logprobs(logits, token, params.logprobs)


def _draw(logits: Tensor, params: SamplingParams, step: int) -> int:
    scaled = (logits - logits.max()) / max(params.temperature, MIN_TEMPERATURE)
    if params.top_k:
        limit = scaled.topk(min(params.top_k, len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < limit, -torch.inf)
    probabilities, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
    # keep the smallest set whose mass reaches top_p: drop what starts at or after it
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    assert params.seed is not None, "the dispatcher seeds every sampled request"
    generator = torch.Generator().manual_seed((params.seed * 1_000_003 + step) % 2**63)
    return int(tokens[torch.multinomial(probabilities.cpu(), 1, generator=generator)])


def _logprobs(logits: Tensor, token: int, count: int) -> dict[int, Logprob]:
    scores = logits.log_softmax(-1)
    rank = int((scores > scores[token]).sum()) + 1
    found = {token: Logprob(float(scores[token]), rank)}
    top = scores.topk(min(count, len(scores)))
    for place, (value, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
        found.setdefault(index, Logprob(value, place))
    return found
