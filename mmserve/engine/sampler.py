"""From a batch of logits to the next tokens, with vLLM's parameters in vLLM's order.

A draw depends only on (seed, step), never on the batch. Knows nothing about sequences, stopping or
where logits come from.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmserve.sampling import Logprob, SamplingParams

MIN_TEMPERATURE = 1e-5  # below it fp32 overflows and the draw is greedy anyway


class Row(NamedTuple):
    """Whose logits a row of the batch is: `step` is the number of the token to choose, from 0."""

    params: SamplingParams
    step: int
    prompt: Sequence[int]
    output: Sequence[int]
    eos: tuple[int, ...]


def sample(logits: Tensor, rows: Sequence[Row]) -> list[tuple[int, dict[int, Logprob] | None]]:
    """Choose each row's next token from fp32 `logits` [B, V], with the log-probabilities asked for.

    Log-probabilities are those of the model, before anything that `SamplingParams` changes (as in vLLM).
    """
    assert len(logits) == len(rows)
    chosen = logits.argmax(-1)
    for place, row in enumerate(rows):
        is_greedy = row.params.temperature < MIN_TEMPERATURE
        if is_greedy and not _adjusts(row):
            continue
        scores = _adjusted(logits[place], row) if _adjusts(row) else logits[place]
        chosen[place] = scores.argmax() if is_greedy else _draw(scores, row)
    tokens: list[int] = chosen.tolist()  # waits for the device, once
    counts = {place: row.params.logprobs for place, row in enumerate(rows) if row.params.logprobs is not None}
    reports: dict[int, dict[int, Logprob]] = {}
    if counts:
        places = _ids(list(counts), logits.device)
        found = _logprobs(logits[places], chosen[places], list(counts.values()))
        reports = dict(zip(counts, found, strict=True))
    return [(token, reports.get(place)) for place, token in enumerate(tokens)]


def prompt_logprobs(logits: Tensor, targets: Tensor, count: int) -> list[dict[int, Logprob]]:
    """Log-probabilities of prompt tokens `targets` [n], and of the `count` most likely in their place.

    `logits` [n, V] are those of the positions before.
    """
    return _logprobs(logits, targets, [count] * len(logits))


def _adjusts(row: Row) -> bool:
    """Whether the row's logits change in a way that greedy sampling notices."""
    params = row.params
    return bool(
        params.logit_bias
        or len(row.output) < params.min_tokens
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def _adjusted(logits: Tensor, row: Row) -> Tensor:
    """A row's logits [V] after bias, the minimum length and penalties."""
    params, device = row.params, logits.device
    logits = logits.clone()
    if params.logit_bias:
        bias = {token: value for token, value in params.logit_bias.items() if token < len(logits)}
        logits[_ids(list(bias), device)] += _floats(list(bias.values()), device)
    if len(row.output) < params.min_tokens:
        stops = [token for token in (*row.eos, *params.stop_token_ids) if token < len(logits)]
        logits[_ids(stops, device)] = -torch.inf
    if params.repetition_penalty != 1:
        # a prompt may hold placeholders that the model cannot say; what occurs twice is written twice alike
        seen = torch.tensor([*row.prompt, *row.output], dtype=torch.int64)
        seen = _moved(seen[(seen >= 0) & (seen < len(logits))], device)
        scores = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if params.presence_penalty or params.frequency_penalty:
        said = Counter(row.output)
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in said.values()]
        logits[_ids(list(said), device)] -= _floats(penalties, device)
    return logits


def _draw(logits: Tensor, row: Row) -> Tensor:
    """A token drawn from adjusted logits [V], still on their device."""
    params = row.params
    scaled = (logits - logits.max()) / params.temperature
    if params.min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(params.min_p), -torch.inf)
    if 0 < params.top_k < len(scaled):
        limit = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < limit, -torch.inf)
    if params.top_p < 1:
        scaled = _within_top_p(scaled, params.top_p)
    assert params.seed is not None, "the dispatcher seeds every sampled request"
    weights = scaled.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(weights, weights[-1:] * _uniform(params.seed, row.step), right=True)
    # only a row of NaN gets past its end; it must not harm the rows beside it
    return drawn[0].clamp(max=len(weights) - 1)


def _within_top_p(scaled: Tensor, top_p: float) -> Tensor:
    """Drop all but the smallest set of tokens whose mass reaches `top_p`."""
    shares = scaled.softmax(-1)
    if shares.device.type == "cpu":
        # all under this share weigh less together than what is dropped, and sorting them takes longest
        likely = (shares > (1 - top_p) / (2 * len(shares))).nonzero()[:, 0]
    else:
        likely = torch.arange(len(shares), device=shares.device)  # a selection would wait for the device
    ordered, places = shares[likely].sort(descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    ranked = likely[places]
    kept = torch.full_like(scaled, -torch.inf)
    kept[ranked] = scaled[ranked].masked_fill(before >= top_p, -torch.inf)
    return kept


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that is the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, step), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[dict[int, Logprob]]:
    """Each row's token with its rank (among equals the last, as in vLLM), then its best alternatives."""
    if not counts:
        return []
    scores = logits.log_softmax(-1)
    own = scores.gather(-1, tokens[:, None])
    ranks = (scores >= own).sum(-1).tolist()
    top = scores.topk(min(max(counts), scores.shape[-1]))
    reports = [
        {token: Logprob(score, rank)}
        for token, score, rank in zip(tokens.tolist(), own[:, 0].tolist(), ranks, strict=True)
    ]
    best = zip(reports, counts, top.indices.tolist(), top.values.tolist(), strict=True)
    for report, count, indices, values in best:
        for place, (index, value) in enumerate(zip(indices[:count], values[:count], strict=True), 1):
            report[index] = Logprob(value, place)
    return reports


def _ids(tokens: Sequence[int], device: torch.device) -> Tensor:
    return _moved(torch.tensor(tokens, dtype=torch.int64), device)


def _floats(values: Sequence[float], device: torch.device) -> Tensor:
    return _moved(torch.tensor(values, dtype=torch.float32), device)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return values.to(device, non_blocking=True)
