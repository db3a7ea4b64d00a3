"""What one engine step runs: a pure function of how far every sequence is and of the pages left.

Knows nothing about tensors, about whose pages are where, or about why a sequence came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Waiting(NamedTuple):
    """A prompt that has no pages yet: of the `ready` rows that may be run, `done` are cached.

    Lower `priority` comes earlier, then lower `arrived`.
    """

    sequence: str
    priority: int
    arrived: int
    done: int
    ready: int
    pages: int  # what its admission takes of `free_pages`, for the whole prompt
    answer_pages: int = 0  # and of `free_answer_pages`


class Prefilling(NamedTuple):
    """An admitted prompt; with `done` equal to `ready` it only holds its pages: over, or waiting for more."""

    sequence: str
    priority: int
    arrived: int
    done: int
    ready: int
    pages: int  # what preempting it would free
    answer_pages: int = 0


class Decoding(NamedTuple):
    """A running answer. Its pages are of those for answers, where answers have their own."""

    sequence: str
    priority: int
    arrived: int
    grow: int  # pages that its next token needs, mostly 0
    pages: int  # what preempting it would free


class EngineState(NamedTuple):
    """Everything a plan depends on. An admitted prompt's pages are its own, so they are not free."""

    waiting: tuple[Waiting, ...]
    prefilling: tuple[Prefilling, ...]
    decoding: tuple[Decoding, ...]
    free_pages: int  # free or evictable now
    places: int  # most sequences that may run
    token_budget: int  # rows per step
    free_answer_pages: int | None = None  # None: answers take those of prompts


class Chunk(NamedTuple):
    """Prompt rows [start, stop) of one sequence."""

    sequence: str
    start: int
    stop: int


class Plan(NamedTuple):
    """One step: first `preempt` gives its pages back, then `admit` takes its own, then all rows run."""

    decodes: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    admit: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()


def schedule(state: EngineState) -> Plan:
    """Every decode advances by one token; prompts share what is left of the budget, one row at least.

    Where pages lack for the decodes, the last to come among all that run is preempted, again and again,
    but never the first, so that something always progresses. A prompt is admitted when the pages of all
    its rows are there, if need be at the expense of running ones of a strictly lower priority; while the
    first that waits does not fit, none overtakes it.
    """
    step = _Step(state)
    step.make_room_for_decodes()
    prompts: list[Prefilling | Waiting] = [*state.prefilling, *state.waiting]
    chunks: list[Chunk] = []
    left = max(state.token_budget - len(step.decodes), 1)
    is_held_back = False
    for prompt in sorted(prompts, key=_turn):
        if left == 0:
            break
        if isinstance(prompt, Waiting):
            is_held_back = is_held_back or not step.try_admit(prompt)
            if is_held_back:
                continue
        elif prompt.sequence in step.preempted:
            continue
        rows = min(left, prompt.ready - prompt.done)
        if rows > 0:
            chunks.append(Chunk(prompt.sequence, prompt.done, prompt.done + rows))
            left -= rows
    decodes = tuple(decode.sequence for decode in state.decoding if decode.sequence in step.decodes)
    return Plan(decodes, tuple(chunks), tuple(step.admitted), tuple(step.preempted))


class _Step:
    """Who still runs while a plan is made, and the pages it has left."""

    def __init__(self, state: EngineState) -> None:
        self.running: list[Prefilling | Decoding] = [*state.prefilling, *state.decoding]
        self.running.sort(key=_order)
        self.decodes = {decode.sequence: decode.grow for decode in state.decoding}
        # of pages for prompts and of those for answers; below 0 while decodes lack them
        self.free = [state.free_pages, state.free_answer_pages or 0]
        self._of_answers = 0 if state.free_answer_pages is None else 1
        self.free[self._of_answers] -= sum(self.decodes.values())
        self.places = state.places
        self.admitted: list[str] = []
        self.preempted: list[str] = []
        # whoever comes after one that had to give way does not get its pages
        self._first_refused: tuple[int, int, str] | None = None

    def make_room_for_decodes(self) -> None:
        while min(self.free) < 0 and len(self.running) > 1:
            self._preempt_last()
        if min(self.free) < 0:
            # only one is left: it waits until others give back what they hold
            (last,) = self.running
            self.free[self._of_answers] += self.decodes.pop(last.sequence)
            self._first_refused = _order(last)

    def try_admit(self, prompt: Waiting) -> bool:
        if self._first_refused is not None and _order(prompt) > self._first_refused:
            return False
        short = [prompt.pages - self.free[0], prompt.answer_pages - self.free[1]]
        places_short = len(self.running) + len(self.admitted) + 1 - self.places
        victims = 0
        while max(short) > 0 or places_short > 0:
            victims += 1
            if victims > len(self.running) or self.running[-victims].priority <= prompt.priority:
                return False
            short = _difference(short, self._freed_by(self.running[-victims]))
            places_short -= 1
        for _ in range(victims):
            self._preempt_last()
        self.free = _difference(self.free, (prompt.pages, prompt.answer_pages))
        self.admitted.append(prompt.sequence)
        return True

    def _preempt_last(self) -> None:
        last = self.running.pop()
        freed = self._freed_by(last)
        self.free = [self.free[0] + freed[0], self.free[1] + freed[1]]
        self.decodes.pop(last.sequence, None)
        self.preempted.append(last.sequence)
        self._first_refused = _order(last)

    def _freed_by(self, sequence: Prefilling | Decoding) -> tuple[int, int]:
        if isinstance(sequence, Prefilling):
            return sequence.pages, sequence.answer_pages
        pages = sequence.pages + self.decodes.get(sequence.sequence, 0)
        return (0, pages) if self._of_answers else (pages, 0)


def _difference(pages: Sequence[int], others: Sequence[int]) -> list[int]:
    return [one - other for one, other in zip(pages, others, strict=True)]


def _order(sequence: Waiting | Prefilling | Decoding) -> tuple[int, int, str]:
    return sequence.priority, sequence.arrived, sequence.sequence


def _turn(prompt: Prefilling | Waiting) -> tuple[int, bool, int, str]:
    """Within a priority, running prompts come before waiting ones."""
    return prompt.priority, isinstance(prompt, Waiting), prompt.arrived, prompt.sequence
