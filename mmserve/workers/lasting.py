"""Which rows of a prompt last, where a method drops the KV of others while the prompt is run.

Rows of text and of images last, and so do the carriers of video frames; see `pruning.carriers`. Knows nothing
about pages or steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve import messages as m
from mmserve.methods import CARRIERS, outer_part
from mmserve.pruning import carriers
from mmserve.pruning.base import make_pruner
from mmserve.request import Methods

IntArray = NDArray[np.int32]


class Lasting:
    """Until which order every row of a growing prompt is seen; with `memory` so many carriers last."""

    def __init__(self, capacity: int, memory: int | None) -> None:
        self.until = np.full(capacity, carriers.FOREVER, np.int32)
        self._bank = None if memory is None else carriers.CarrierBank(memory)

    @property
    def is_limited(self) -> bool:
        """Whether carriers may still leave: what other prompts share must not have any then."""
        return self._bank is not None

    def add(self, start: int, order: IntArray, frame: IntArray, embeddings: Callable[[], Tensor]) -> None:
        """Rows from `start` on, whole frames; `frame` is the number of each row's frame, -1 for none."""
        frames = torch.tensor(frame)
        until = carriers.seen_until(frames).numpy()
        passing = until < carriers.FOREVER
        self.until[start : start + len(order)][passing] = order[until[passing] - 1] + 1
        if self._bank is None:
            return
        places = carriers.carrier_slots(frames).nonzero()[:, 0].tolist()
        for place, embedding in zip(places, embeddings()[places], strict=True):
            leaving = self._bank.add(start + place, embedding)
            if leaving is not None:
                self.until[leaving] = order[place] + 1


def lasting_of(methods: Methods, capacity: int) -> Lasting | None:
    """None where every row lasts."""
    name, _, options = outer_part(methods)
    if name not in CARRIERS:
        return None
    pruner = make_pruner(name, 1.0, **options)
    assert isinstance(pruner, carriers.SemanticCarriers)
    return Lasting(capacity, pruner.memory)


def most_slots(command: m.PrefillPrompt, step_rows: int) -> int:
    """Slots per head that a prompt takes at most at a time, when up to `step_rows` of its rows run in a step.

    Beside what lasts these are the rows of a step, and those of a frame that the step before has begun.
    """
    text = len(command.token_ids) - len(command.items)
    rows = text + sum(item.keep_bound for item in command.items)
    lasting = text + sum(
        item.keep_bound if item.lasting_bound is None else item.lasting_bound for item in command.items
    )
    return min(rows, lasting + step_rows + max((item.frame_rows for item in command.items), default=0))
