"""What goes into a forward pass of the engine, and what comes out of a step. Knows nothing about pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.paged import SequenceRows, Watch
from mmserve.engine.rows import PromptRows
from mmserve.engine.scheduler import Chunk


class StepResult(NamedTuple):
    """What a step computed: one row of fp32 logits per name, decodes first, then completed prompts."""

    names: tuple[str, ...]
    logits: Tensor  # [names, V]
    prompt_hidden: dict[str, Tensor]  # of a chunk's rows [rows, D], for prompts that want their logits


class Batch(NamedTuple):
    """The packed rows of one step: those of `tokens`, then `pieces` of prompts."""

    tokens: list[int]
    pieces: list[Tensor]
    positions: list[NDArray[np.int32]]
    rows: list[SequenceRows]
    observe: dict[str, range]
    watch: list[Watch]


def observed(chunk: Chunk, prompt: PromptRows, start: int) -> dict[str, range]:
    """Which rows of the packed batch are observed, for a chunk that begins at `start` of it."""
    if not prompt.is_observed or not prompt.is_whole:
        return {}
    first = max(prompt.first_observed, chunk.start)
    if first >= chunk.stop:
        return {}
    return {chunk.sequence: range(start + first - chunk.start, start + chunk.stop - chunk.start)}
