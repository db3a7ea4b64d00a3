"""Where every request of a language worker stands, and what the scheduler is told about it.

Knows nothing about messages going out, steps or the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import numpy as np

from mmserve import messages as m
from mmserve.attention.base import make_pattern
from mmserve.attention.selection import Quest
from mmserve.engine.rows import DecodeRow, PromptRows
from mmserve.engine.runner import Runner
from mmserve.engine.sampler import Row
from mmserve.engine.scheduler import Decoding, EngineState, Prefilling, Waiting
from mmserve.errors import BadRequest
from mmserve.kv.identity import Identity
from mmserve.kv.table import OutOfPages
from mmserve.pruning.carriers import FOREVER
from mmserve.request import AttentionReport, Methods
from mmserve.sampling import Logprob
from mmserve.workers.lasting import most_slots
from mmserve.workers.prompts import GrowingPrompt
from mmserve.workers.survivors import MAX_REPORTED


@dataclass(slots=True, kw_only=True)
class Prefill:
    """A prompt that is being run. Times are of `time.perf_counter`."""

    prompt: GrowingPrompt
    rows: PromptRows
    layers: int  # of the model
    queue_ms: float
    transfer_ms: float
    started_at: float
    stalled_at: float | None = None  # since when it waits for more of its rows
    stalled_ms: float = 0.0  # or reads what has come
    # by index in the uncompressed prompt, when asked for
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)

    def note_loaded(self, started_at: float, now: float) -> None:
        """More of it was read meanwhile."""
        self.transfer_ms += (now - started_at) * 1e3
        if self.stalled_at is None:
            self.stalled_ms += (now - started_at) * 1e3
        elif self.rows.ready > self.rows.done:
            self.stalled_ms += (now - self.stalled_at) * 1e3
            self.stalled_at = None

    @property
    def prompt_logprobs(self) -> tuple[dict[int, Logprob] | None, ...] | None:
        """One entry per token of the uncompressed prompt; none for the first and for what was pruned."""
        if not self.rows.wants_logits:
            return None
        return tuple(self.logprobs.get(place) for place in range(self.prompt.length))

    @property
    def visual_by_layer(self) -> tuple[int, ...]:
        """Visual rows of a finished prompt in each layer."""
        groups = self.rows.groups
        if groups is not None:
            return groups.visual_by_layer
        return (int(self.prompt.is_visual.sum()),) * self.layers

    @property
    def attention_density(self) -> tuple[float, ...]:
        """Of every layer of a finished prompt."""
        pattern = self.rows.pattern
        return (1.0,) * self.layers if pattern is None else pattern.density(self.layers)

    @property
    def attention(self) -> AttentionReport | None:
        """What the pattern of a finished prompt has lost; None where nobody asks."""
        probe = None if self.rows.pattern is None else self.rows.pattern.probe
        return None if probe is None else AttentionReport(**probe.found(self.layers)._asdict())

    @property
    def survivors(self) -> bytes | None:
        """Orders of the visual rows of a finished prompt that all layers have; None where nobody asks."""
        rows = self.rows
        if not self.prompt.command.report_tokens or len(rows) > MAX_REPORTED:
            return None
        is_there = rows.is_visual if rows.until is None else rows.is_visual & (rows.until == FOREVER)
        return rows.order[is_there].astype("<i4").tobytes()


@dataclass(slots=True, kw_only=True)
class Prefilled:
    """A prompt whose KV is here and whose `DecodeFrom` is on its way. `identity` None: not to be shared."""

    prompt: GrowingPrompt
    identity: Identity | None


@dataclass(slots=True, kw_only=True)
class Decode:
    """A running answer: `tokens` are known, those before `fed` are in the cache."""

    command: m.DecodeFrom
    arrived: int
    tokens: list[int]
    identity: Identity | None
    selector: Quest | None = None
    fed: int = 0

    @property
    def row(self) -> DecodeRow:
        start = self.command
        order, position = start.next_order + self.fed, start.next_position + self.fed
        return DecodeRow(self.tokens[self.fed], order, position, self.selector)


class Sequences:
    """A request is in exactly one of the dicts."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._arrivals = count()
        self.waiting: dict[str, GrowingPrompt] = {}
        self.imports: dict[str, m.DecodeFrom] = {}  # their KV lies in a lease
        self.prefills: dict[str, Prefill] = {}
        self.prefilled: dict[str, Prefilled] = {}
        self.decodes: dict[str, Decode] = {}

    def __len__(self) -> int:
        return len(self.waiting) + len(self.imports) + self._runner.answers.num_sequences

    def wait_for_pages(self, prompt: GrowingPrompt) -> None:
        """A prompt is here; raises what says why it never could run."""
        command, most = prompt.command, self._runner.most_pages
        needed = self._runner.table.pages_for(prompt.slots + prompt.headroom)
        if needed > most and prompt.is_probed:
            raise BadRequest(
                f"Expected room in {most} KV pages for a prompt and the rows that kv "
                f"{command.methods.kv} runs after it, but they take {needed}"
            )
        if needed > most:
            raise OutOfPages(f"Expected a prompt of at most {most} KV pages, but got {needed}")
        self.waiting[command.request_id] = prompt

    def arrive(self) -> int:
        """The number of the next one to come."""
        return next(self._arrivals)

    def forget(self, name: str) -> None:
        """Harmless when it is unknown."""
        for place in (self.waiting, self.imports, self.prefills, self.prefilled, self.decodes):
            place.pop(name, None)
        self._runner.release(name)

    def command(self, name: str) -> m.PrefillPrompt | m.DecodeFrom:
        """What a sequence that has pages was sent as."""
        if name in self.decodes:
            return self.decodes[name].command
        held = self.prefills.get(name) or self.prefilled[name]
        return held.prompt.command

    def awaits(self, command: m.DecodeFrom) -> bool:
        """Whether its prompt was prefilled here, in the same attempt."""
        held = self.prefilled.get(command.request_id)
        return held is not None and held.prompt.command.attempt == command.attempt

    def begin_decode(self, command: m.DecodeFrom) -> None:
        """The sequence is here; who was prefilled here keeps its turn."""
        before = self.prefilled.pop(command.request_id, None)
        self.decodes[command.request_id] = Decode(
            command=command,
            arrived=self.arrive() if before is None else before.prompt.arrived,
            tokens=list(command.tokens),
            identity=None if before is None else before.identity,
            selector=_selector(command.methods),
        )

    def imports_in_turn(self) -> list[m.DecodeFrom]:
        """Those whose pages are there, and all that running answers need next; a later one waits behind."""
        runner, table = self._runner, self._runner.answers
        left = runner.available_answer_pages - sum(table.missing_pages(name, 1) for name in self.decodes)
        places = runner.places - table.num_sequences
        turn: list[m.DecodeFrom] = []
        for command in sorted(self.imports.values(), key=lambda command: command.priority):
            left -= table.pages_for(import_slots(command))
            if left < 0 or len(turn) == places:
                break
            turn.append(command)
        return turn

    def promised_pages(self) -> int:
        """What those that have no pages yet will take."""
        table = self._runner.table
        prompts = sum(table.pages_for(prompt.slots + prompt.headroom) for prompt in self.waiting.values())
        return prompts + sum(table.pages_for(import_slots(command)) for command in self.imports.values())

    def state(self, token_budget: int) -> EngineState:
        """What the scheduler decides on."""
        runner, table = self._runner, self._runner.answers
        return EngineState(
            waiting=tuple(self._not_held_back()),
            prefilling=(
                *(
                    self._admitted(name, one.prompt, one.rows.done, one.rows.ready)
                    for name, one in self.prefills.items()
                ),
                *(self._admitted(name, one.prompt, 0, 0) for name, one in self.prefilled.items()),
            ),
            decoding=tuple(
                Decoding(
                    sequence=name,
                    priority=decode.command.priority,
                    arrived=decode.arrived,
                    grow=table.missing_pages(name, 1),
                    pages=runner.answer_pages_freed_by(name),
                )
                for name, decode in self.decodes.items()
            ),
            free_pages=runner.available_pages,
            places=runner.places,
            token_budget=token_budget,
            free_answer_pages=runner.available_answer_pages if runner.has_answer_pages else None,
        )

    def _admitted(self, name: str, prompt: GrowingPrompt, done: int, ready: int) -> Prefilling:
        return Prefilling(
            sequence=name,
            priority=prompt.command.priority,
            arrived=prompt.arrived,
            done=done,
            ready=ready,
            pages=self._runner.pages_freed_by(name),
            answer_pages=self._runner.answer_pages_freed_by(name) if self._runner.has_answer_pages else 0,
        )

    def _not_held_back(self) -> list[Waiting]:
        """Those that do not do better to wait for the KV of one that comes before them."""
        ahead = [(prefill.prompt, prefill.rows.done) for prefill in self.prefills.values()]
        turn = sorted(self.waiting.items(), key=lambda entry: _turn(entry[1]))
        going_on = []
        for name, prompt in turn:
            cached, busy = self._runner.cached(prompt.identity, prompt.most_cached)
            pages, answer_pages = self._runner.prompt_pages(prompt.slots, prompt.headroom)
            if any(self._is_worth_waiting_for(prompt, cached, *other) for other in ahead):
                continue
            done = prompt.row_after(cached)
            if not prompt.is_whole and prompt.ready - done < self._runner.table.page_size:
                continue  # nothing to run yet; when it has grown, more of it may be cached
            ahead.append((prompt, done))
            going_on.append(
                Waiting(
                    sequence=name,
                    priority=prompt.command.priority,
                    arrived=prompt.arrived,
                    done=done,
                    ready=prompt.ready,
                    pages=pages - busy,
                    answer_pages=answer_pages,
                )
            )
        return going_on

    def _is_worth_waiting_for(
        self, prompt: GrowingPrompt, cached: int, other: GrowingPrompt, done: int
    ) -> bool:
        """Whether `other` leaves more behind than half of what it has still to run, and comes first."""
        # one that still grows may wait for media that have nothing to do with this one
        if not other.is_whole or _turn(other) > _turn(prompt):
            return False
        size = self._runner.table.page_size
        shared = min(prompt.identity.common(other.identity), prompt.most_cached) // size * size
        saved = prompt.row_after(shared) - prompt.row_after(cached)
        return saved > (other.capacity - done) // 2

    def sampler_row(self, name: str, eos_tokens: tuple[int, ...]) -> Row:
        if name in self.decodes:
            decode = self.decodes[name]
            command, prompt, output = decode.command, decode.command.prompt_ids, decode.tokens
            return Row(command.sampling, len(output), prompt, output, eos_tokens)
        first = self.prefills[name].prompt.command
        return Row(first.sampling, 0, first.token_ids, (), eos_tokens)

    def whole_identity(self, name: str) -> Identity | None:
        """What the KV of a decoded sequence holds, its answer included; None when it is not to be shared."""
        decode = self.decodes[name]
        if decode.identity is None:
            return None
        start, fed = decode.command, np.arange(decode.fed, dtype=np.int32)
        tokens = np.array(decode.tokens[: decode.fed], np.int64)
        return decode.identity.extended(tokens, start.next_order + fed, start.next_position + fed)


def _turn(prompt: GrowingPrompt) -> tuple[int, int]:
    return prompt.command.priority, prompt.arrived


def _selector(methods: Methods) -> Quest | None:
    """What says which pages an answer reads; None where it reads all."""
    if methods.attention != Quest.name:
        return None
    found = make_pattern(methods.attention, **methods.attention_options)
    assert isinstance(found, Quest), "so it is registered"
    return found


def slots_of(command: m.PrefillPrompt | m.ExtendPrompt | m.DecodeFrom, step_rows: int) -> int:
    """Slots per head that a command takes at first; a sequence that is here has its pages already."""
    if isinstance(command, m.PrefillPrompt):
        return most_slots(command, step_rows) + m.answer_slots(command.sampling, len(command.forced))
    if isinstance(command, m.ExtendPrompt) or command.lease is None:
        return 0
    return import_slots(command)


def import_slots(command: m.DecodeFrom) -> int:
    return command.slots + m.answer_slots(command.sampling, len(command.tokens))
