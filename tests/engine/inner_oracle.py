"""A prompt whose visual rows are thinned out between layers, in plain torch: one pass, no pages, no chunks.

The answer's rows run behind the prompt's: attention is causal, so they change nothing before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmserve.models.decoder import TextDecoder
from mmserve.models.rope import rope_angles, rope_frequencies_on
from mmserve.pruning.inner import InnerReducer, InnerView


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt at the input of a layer; `attention` is the layer before's, [Hq, n, n], None at layer 0."""

    hidden: Tensor  # [n, D]
    attention: Tensor | None
    visual: list[int]  # rows
    reducible: list[int]  # of these, without newlines
    patch: list[int]
    entered: int
    stage: int
    stages: int


# which rows go on, ascending, and what they hold
Drop = Callable[[Seen], tuple[list[int], Tensor]]


@dataclass(frozen=True, slots=True)
class Reduced:
    logits: Tensor  # [V] after the last row
    lengths: list[int]  # rows of the prompt in every layer
    places: list[int]  # of the rows that pass the last layer


@dataclass(frozen=True, slots=True)
class Laid:
    """A prompt: what its rows hold, where they stood, which of them are visual and which may be dropped.

    `patch` is as in `InnerView`, -1 for text.
    """

    embeddings: Tensor  # [n, D]
    places: list[int]
    visual: list[int]
    reducible: list[int]
    patch: list[int]


def run(
    decoder: TextDecoder,
    laid: Laid,
    answered: Tensor,
    drops: Mapping[int, Drop],
    gone: Sequence[int] = (),
) -> Reduced:
    """One pass over a prompt and the embeddings [m, D] of what was answered to it.

    Before anything is dropped the answer does not see the rows `gone`.
    """
    config = decoder.config
    frequencies = rope_frequencies_on(answered.device, config.head_dim, config.rope_theta)
    x, prompt = torch.cat([laid.embeddings, answered]), len(laid.embeddings)
    after = laid.places[-1] + 1
    positions = torch.tensor([*laid.places, *range(after, after + len(answered))])
    visual, reducible, patch = laid.visual, laid.reducible, laid.patch
    attention: Tensor | None = None
    entered, stage, lengths = len(reducible), 0, []
    for index in range(config.layers):
        if index in drops:
            inside = None if attention is None else attention[:, :prompt, :prompt]
            seen = Seen(x[:prompt], inside, visual, reducible, patch, entered, stage, len(drops))
            rows, hidden = drops[index](seen)
            x = torch.cat([hidden, x[prompt:]])
            kept = torch.tensor([*rows, *range(prompt, len(positions))])
            positions = positions[kept]
            visual = [at for at, row in enumerate(rows) if row in visual]
            reducible = [at for at, row in enumerate(rows) if row in reducible]
            patch = [patch[row] for row in rows]
            prompt, stage = len(rows), stage + 1
        lengths.append(prompt)
        cos, sin = rope_angles(positions, frequencies, x.dtype)
        paid: list[Tensor] = []
        unseen = [] if stage else list(gone)
        x = decoder.layers[index](x, cos, sin, index, _attend(paid, prompt, unseen))
        attention = paid[0]
    return Reduced(decoder.logits(decoder.norm(x))[-1], lengths, positions[:prompt].tolist())


def _attend(
    paid: list[Tensor], prompt: int, unseen: list[int]
) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        causal[prompt:, unseen] = False
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        paid.append(weights)
        return torch.einsum("hqk,khd->qhd", weights, v)

    return attend


@torch.inference_mode()
def answer(
    decoder: TextDecoder, laid: Laid, count: int, drops: Mapping[int, Drop], *, drops_below: bool = False
) -> tuple[list[int], list[int]]:
    """Greedy tokens, and how many rows of the prompt every layer has.

    With `drops_below` the answer sees in no layer what was dropped.
    """
    gone: list[int] = []
    if drops_below:
        left = run(decoder, laid, decoder.embed(torch.empty(0, dtype=torch.long)), drops).places
        gone = [row for row, place in enumerate(laid.places) if place not in left]
    tokens: list[int] = []
    for _ in range(count):
        answered = decoder.embed(torch.tensor(tokens, dtype=torch.long))
        found = run(decoder, laid, answered, drops, gone)
        tokens.append(int(found.logits.argmax()))
    return tokens, found.lengths


def drop_by(score: Callable[[Seen], Tensor], count: Callable[[Seen], int]) -> Drop:
    """Keep the reducible rows with the highest scores, an earlier one before a later one."""

    def drop(seen: Seen) -> tuple[list[int], Tensor]:
        scores = score(seen).tolist()
        best = sorted(seen.reducible, key=lambda row: (-scores[row], row))[: count(seen)]
        rows = [row for row in range(len(seen.hidden)) if row in best or row not in seen.reducible]
        return rows, seen.hidden[rows]

    return drop


def last_row(seen: Seen) -> Tensor:
    """FastV's score: mean over heads of what the last row pays."""
    assert seen.attention is not None
    return seen.attention.mean(0)[-1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _View(InnerView):
    """What a method sees, with the attention of the plain pass."""

    paid: Tensor | None  # [Hq, m, n]

    def head_attention(self, last: int | None = None) -> Tensor:
        assert self.paid is not None, "there is no attention at layer 0"
        return self.paid if last is None else self.paid[:, -last:]


def by_method(reducer: InnerReducer) -> Drop:
    """The method itself: what is put to the test is the engine."""
    memory: list[Tensor | None] = [None]

    def drop(seen: Seen) -> tuple[list[int], Tensor]:
        count, first = len(seen.hidden), seen.visual[0]
        observed = max(count - 64, seen.visual[-1] + 1)
        places = torch.arange(first, count)
        view = _View(
            stage=seen.stage,
            stages=seen.stages,
            entered=seen.entered,
            hidden=seen.hidden[first:],
            is_visual=torch.isin(places, torch.tensor(seen.visual)),
            is_reducible=torch.isin(places, torch.tensor(seen.reducible)),
            patch=torch.tensor(seen.patch[first:]),
            memory=memory[0] if seen.stage else None,
            paid=None if seen.attention is None else seen.attention[:, observed:, first:],
        )
        rows, hidden, memory[0] = reducer.reduce(view)
        return [*range(first), *(rows + first).tolist()], torch.cat([seen.hidden[:first], hidden])

    return drop
