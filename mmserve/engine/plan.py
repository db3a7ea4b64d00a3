"""What one engine step runs: a pure function of how far every sequence is. Knows nothing about tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Pending(NamedTuple):
    """A prompt that is not fully prefilled: rows `done` of `total`."""

    sequence: str
    done: int
    total: int


class Chunk(NamedTuple):
    """Prompt rows [start, stop) of one sequence."""

    sequence: str
    start: int
    stop: int


class Plan(NamedTuple):
    decodes: tuple[str, ...]
    chunks: tuple[Chunk, ...]


def plan_step(prefills: Sequence[Pending], decodes: Sequence[str], token_budget: int) -> Plan:
    """Every running decode advances by one token; prompts share what is left of the budget, oldest first.

    At least one prompt row runs even when decodes use the whole budget, so prompts never starve.
    """
    left = max(token_budget - len(decodes), 1)
    chunks = []
    for pending in prefills:
        if left <= 0:
            break
        rows = min(left, pending.total - pending.done)
        chunks.append(Chunk(pending.sequence, pending.done, pending.done + rows))
        left -= rows
    return Plan(tuple(decodes), tuple(chunks))
