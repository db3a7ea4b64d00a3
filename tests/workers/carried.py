"""Videos of whole frames for the fake engine, and what carriers make of a prompt with them, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from mmserve import messages as m
from mmserve.models.decoder import TextDecoder
from mmserve.pruning.carriers import CarrierBank, carrier_mask, carrier_slots, remaining, seen_until
from mmserve.request import Methods
from tests.workers.fakes import IMAGE, VIDEO, WIDTH, Engine, tiny_decoder

CARRIERS = Methods(prune="carriers")
MEMORY = 5
LIMITED = Methods(prune="carriers", prune_options={"memory": MEMORY})


@dataclass(frozen=True)
class Clip:
    """A video of `frames` frames of `size` tokens, and a newline behind them; an image without frames."""

    frames: int
    size: int
    seed: int
    frames_per_part: int = 8

    def item(self, engine: Engine) -> m.PromptItem:
        parts = tuple(self.parts(engine))
        if self.is_image:
            return m.PromptItem(parts=parts, is_whole=True, keep_bound=self.tokens)
        return m.PromptItem(
            parts=parts,
            is_whole=True,
            keep_bound=self.tokens,
            lasting_bound=self.frames + 1,
            frame_rows=self.size,
        )

    def parts(self, engine: Engine) -> list[m.EncodedPart]:
        if self.is_image:
            return [engine.part(self.size, seed=self.seed)]
        parts = []
        for first in range(0, self.frames, self.frames_per_part):
            count = min(self.frames_per_part, self.frames - first)
            frame = np.repeat(np.arange(count), self.size).tolist()
            if first + count == self.frames:
                frame.append(-1)
            parts.append(engine.part(len(frame), seed=self.seed, first=first * self.size, frame=frame))
        return parts

    @property
    def is_image(self) -> bool:
        return self.frames == 0

    @property
    def token(self) -> int:
        return IMAGE if self.is_image else VIDEO

    @property
    def tokens(self) -> int:
        return self.size if self.is_image else self.frames * self.size + 1

    @property
    def frame(self) -> list[int]:
        """The frame of every token."""
        if self.is_image:
            return [-1] * self.size
        return [number for number in range(self.frames) for _ in range(self.size)] + [-1]

    @property
    def embeddings(self) -> Tensor:
        # as the fake engine makes them: those of a prefix are a prefix
        every = np.random.default_rng(self.seed).standard_normal((self.tokens, WIDTH))
        return torch.from_numpy(every.astype(np.float32))


def plain(item: m.PromptItem) -> m.PromptItem:
    """The same for a method that drops nothing."""
    return msgspec.structs.replace(item, lasting_bound=None, frame_rows=0)


@dataclass(frozen=True)
class Carried:
    """A prompt: token ids with a placeholder per clip."""

    token_ids: tuple[int, ...]
    clips: tuple[Clip, ...] = ()

    def items(self, engine: Engine) -> tuple[m.PromptItem, ...]:
        return tuple(clip.item(engine) for clip in self.clips)

    @property
    def frame(self) -> Tensor:
        """The frame of every token of the uncompressed prompt, numbered over all clips, -1 for none."""
        clips, found, first = iter(self.clips), [], 0
        for token in self.token_ids:
            if token not in (IMAGE, VIDEO):
                found.append(-1)
                continue
            clip = next(clips)
            found += [number + first if number >= 0 else -1 for number in clip.frame]
            first += clip.frames
        return torch.tensor(found)

    @property
    def lasting(self) -> int:
        return int(remaining(self.frame).sum())

    @property
    def expanded(self) -> list[int]:
        """The uncompressed prompt."""
        clips = iter(self.clips)
        return [
            token
            for one in self.token_ids
            for token in ([one] * next(clips).tokens if one in (IMAGE, VIDEO) else [one])
        ]

    def answer(self, count: int, until: Tensor | None = None) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the logits of the first: everything run anew for each token.

        Under the mask of carriers, or of what says `until` which token each one is seen.
        """
        mask = carrier_mask(self.frame) if until is None else torch.arange(len(until))[:, None] < until
        decoder, clips = tiny_decoder(), iter(self.clips)
        rows = [
            next(clips).embeddings
            if token in (IMAGE, VIDEO)
            else decoder.embed(torch.tensor([token])).detach()
            for token in self.token_ids
        ]
        said: list[int] = []
        first = torch.empty(0)
        with torch.inference_mode():
            while len(said) < count:
                logits = _logits(decoder, torch.cat(rows), mask)
                if not said:
                    first = logits
                said.append(int(logits.argmax()))
                rows.append(decoder.embed(torch.tensor(said[-1:])))
        return said, first


def _logits(decoder: TextDecoder, rows: Tensor, mask: Tensor) -> Tensor:
    """Of the last row; rows behind those of `mask` are text, which sees what its last row sees."""
    more = len(rows) - len(mask)
    seen = torch.cat([mask, mask[-1:].expand(more, -1)])
    seen = torch.cat([seen, torch.ones(len(rows), more, dtype=torch.bool)], 1).tril()
    hidden_from = torch.zeros(len(rows), len(rows)).masked_fill(~seen, -math.inf)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5 + hidden_from
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    hidden = decoder(rows, torch.arange(len(rows)), attend)
    return decoder.logits(hidden[-1:])[0]


def text(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, 46, count).tolist())


def prompts() -> dict[str, Carried]:
    one: Sequence[Clip] = (Clip(1, 6, 1),)
    return {
        "one frame": Carried((*text(3), VIDEO, *text(5, 1)), tuple(one)),
        "three frames": Carried((*text(4), VIDEO, *text(6, 1)), (Clip(3, 5, 2, 2),)),
        "sixteen frames": Carried((*text(2), VIDEO, *text(7, 1)), (Clip(16, 9, 3),)),
        "two videos": Carried(
            (*text(3), VIDEO, *text(6, 1), VIDEO, *text(4, 2)), (Clip(4, 7, 4, 3), Clip(5, 6, 5, 4))
        ),
        "an image between": Carried(
            (VIDEO, *text(2), IMAGE, VIDEO, *text(9, 1)), (Clip(3, 4, 6), Clip(0, 10, 7), Clip(2, 8, 8))
        ),
        "text": Carried(text(11)),
    }


def limited_until(prompt: Carried) -> Tensor:
    """Until when every token is seen where there is room for `MEMORY` carriers."""
    frame, rows = prompt.frame, torch.cat([clip.embeddings for clip in prompt.clips])
    until, bank = seen_until(frame), CarrierBank(MEMORY)
    visual = [place for place, token in enumerate(prompt.expanded) if token in (IMAGE, VIDEO)]
    for place in carrier_slots(frame).nonzero()[:, 0].tolist():
        leaving = bank.add(place, rows[visual.index(place)])
        if leaving is not None:
            until[leaving] = place + 1
    return until
