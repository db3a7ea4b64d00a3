"""What the dispatcher remembers about a request and about a worker. Plain state, no decisions."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from signal import SIGKILL

from mmserve.errors import MMServeError
from mmserve.messages import (
    Credits,
    EncodedMedia,
    EncodedPart,
    Lease,
    PromptItem,
    PromptPrefilled,
    Role,
    Sampled,
)
from mmserve.request import FinishReason, MediaReport, Prompt, Timings, Usage
from mmserve.sampling import Logprob

MAX_LOSSES = 3  # without progress: what a request waits for is made again at most so many times
MAX_DEATHS = 3  # without progress, then a request is poison even when only SIGKILL was seen


class State(StrEnum):
    FETCHING = "fetching"
    QUEUED = "queued"
    ENCODING = "encoding"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (State.FINISHED, State.FAILED, State.CANCELLED)


@dataclass(slots=True)
class Item:
    """One media item of a request. Its parts come one after the other, `whole` with the last."""

    worker: str | None = None  # who encodes it now
    keep_bound: int | None = None  # most tokens it can end up with, once planned
    lasting_bound: int | None = None  # of these, most whose KV stays, where a method drops some
    frame_rows: int = 0  # that such a method drops together
    helpers: dict[str, set[int]] = field(default_factory=dict)  # by worker: frames it still encodes
    lent: list[Lease] = field(default_factory=list)  # what they have sent to its worker
    parts: list[EncodedPart] = field(default_factory=list)
    whole: EncodedMedia | None = None

    @property
    def is_whole(self) -> bool:
        return self.whole is not None

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def kept(self) -> int:
        return sum(part.kept for part in self.parts)

    @property
    def most_kept(self) -> int:
        """Of a planned item, how many rows to count with."""
        if self.is_whole:
            return self.kept
        assert self.keep_bound is not None, "an item without a plan has no bound"
        return self.keep_bound

    @property
    def most_lasting(self) -> int:
        """Of a planned item, how many KV slots to count with when its prefill is over."""
        return self.most_kept if self.lasting_bound is None else min(self.lasting_bound, self.most_kept)

    @property
    def report(self) -> MediaReport | None:
        return None if self.whole is None else self.whole.report

    def for_prefill(self) -> PromptItem:
        return PromptItem(
            parts=tuple(self.parts),
            is_whole=self.is_whole,
            keep_bound=self.most_kept,
            lasting_bound=self.lasting_bound,
            frame_rows=self.frame_rows,
        )


@dataclass(slots=True, kw_only=True)
class Record:
    """A request from admission to its one terminal state. Times are seconds of the injected clock."""

    request_id: str
    admitted_at: float
    deadline_at: float
    arrival: int = 0  # running number of its admission
    prompt: Prompt | None = None
    state: State = State.FETCHING
    attempt: int = 0
    items: list[Item] = field(default_factory=list)
    worker: str | None = None  # language worker that has it now
    prefilled: PromptPrefilled | None = None
    # of the first prefill: later ones find in caches what the first one left there
    first: tuple[list[Item], PromptPrefilled] | None = None
    kv_lease: Lease | None = None
    tokens: list[Sampled] = field(default_factory=list)
    is_suspect: bool = False  # was in a step that died: runs alone from now on
    deaths_without_progress: int = 0
    losses_without_progress: int = 0
    fetch_ms: float = 0.0
    waited_ms: float = 0.0  # for credits, over all stages until the first token
    first_token_at: float | None = None
    ended_at: float | None = None
    finish: FinishReason | None = None
    error: MMServeError | None = None

    @property
    def submitted(self) -> Prompt:
        assert self.prompt is not None, "a record past FETCHING has its prompt"
        return self.prompt

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)

    @property
    def can_prefill(self) -> bool:
        """Whether every item is planned, and the first one has begun to come."""
        is_planned = all(item.is_whole or item.keep_bound is not None for item in self.items)
        return is_planned and all(item.parts for item in self.items[:1])

    @property
    def is_encoded(self) -> bool:
        return all(item.is_whole for item in self.items)

    @property
    def leases(self) -> list[Lease]:
        """What was published for it and is not released."""
        kv = [] if self.kv_lease is None else [self.kv_lease]
        return [part.lease for item in self.items for part in item.parts] + kv

    @property
    def prompt_slots(self) -> int:
        """Slots per head that its prompt takes at most, once its items are planned and it is prefilled."""
        return sum(item.most_lasting for item in self.items) + self.text_slots

    @property
    def text_slots(self) -> int:
        return len(self.submitted.token_ids) - len(self.submitted.media)

    @property
    def visual_kept(self) -> int:
        lasting = self.prefilled.visual_lasting if self.prefilled else None
        return sum(item.kept for item in self.items) if lasting is None else lasting

    @property
    def prompt_logprobs(self) -> tuple[dict[int, Logprob] | None, ...] | None:
        return self.prefilled.prompt_logprobs if self.prefilled else None

    def take_prefilled(self, event: PromptPrefilled) -> None:
        self.prefilled, self.kv_lease, self.state = event, event.lease, State.DECODING
        if self.first is None:
            self.first = self.items, event

    def end(self, state: State, now: float) -> None:
        """Reach a terminal state; what is reported is the first prefill, whatever was repeated."""
        self.state, self.ended_at, self.kv_lease = state, now, None
        if self.first is not None:
            self.items, self.prefilled = self.first

    def blame(self, by_signal: int) -> bool:
        """A death in its step makes a request a suspect; a second one, alone, makes it poison (True).

        SIGKILL says little about the request (an operator, the kernel's memory killer), so there the
        limit is `MAX_DEATHS` without progress.
        """
        self.deaths_without_progress += 1
        was_alone, self.is_suspect = self.is_suspect, True
        return self.deaths_without_progress >= MAX_DEATHS or (was_alone and by_signal != SIGKILL)

    def usage(self) -> Usage:
        visual = sum(item.tokens for item in self.items)
        by_layer = self.prefilled.visual_by_layer if self.prefilled else ()
        return Usage(
            prompt_tokens=len(self.submitted.token_ids) - len(self.items) + visual,
            completion_tokens=len(self.tokens),
            cached_tokens=self.prefilled.cached_slots if self.prefilled else 0,
            visual_tokens=visual,
            visual_tokens_kept=self.visual_kept,
            visual_tokens_layer_mean=sum(by_layer) / len(by_layer) if by_layer else 0.0,
            visual_tokens_by_layer=by_layer if len(set(by_layer)) > 1 else (),
            visual_tokens_cached=sum(item.whole.cached_tokens for item in self.items if item.whole),
            kv_bytes=self.prefilled.kv_bytes if self.prefilled else 0,
            kv_bytes_uncompressed=self.prefilled.kv_bytes_uncompressed if self.prefilled else 0,
            kv_bytes_dense=self.prefilled.kv_bytes_dense if self.prefilled else 0,
            attention_density=self.prefilled.attention_density if self.prefilled else (),
            attention_recall=probed.recall if (probed := self.prefilled and self.prefilled.attention) else (),
        )

    def timings(self) -> Timings:
        """Stage times whose parts sum to `ttft`; parts that ran in parallel are scaled to fit."""
        end = self.ended_at if self.ended_at is not None else self.admitted_at
        first = self.first_token_at if self.first_token_at is not None else end
        times = [item.whole.times for item in self.items if item.whole]
        prefilled = self.prefilled
        parts = {
            "fetch": self.fetch_ms,
            "decode": sum(t.decode for t in times),
            "preprocess": sum(t.preprocess for t in times),
            "encode": sum(t.encode for t in times),
            "prune": sum(t.prune for t in times),
            "transfer": sum(t.publish for t in times) + (prefilled.transfer_ms if prefilled else 0.0),
            "queue": self.waited_ms
            + sum(t.queue for t in times)
            + (prefilled.queue_ms if prefilled else 0.0),
            "prefill": prefilled.prefill_ms if prefilled else 0.0,
        }
        ttft = (first - self.admitted_at) * 1e3
        measured = sum(parts.values())
        if measured > ttft:
            parts = {name: value * ttft / measured for name, value in parts.items()}
        other = max(ttft - sum(parts.values()), 0.0)
        total = (end - self.admitted_at) * 1e3
        return Timings(**parts, other=other, ttft=ttft, generate=total - ttft, total=total)


@dataclass(slots=True, kw_only=True)
class Worker:
    """A live worker as the dispatcher sees it.

    Credits are absolute; what was sent after the last command the worker had seen is subtracted.
    """

    name: str
    roles: tuple[Role, ...]
    pid: int
    capacity: Credits
    credits: Credits
    last_heard_at: float
    sent: int = 0
    unseen: deque[tuple[int, int]] = field(default_factory=deque)  # (command number, slots)
    holds: set[str] = field(default_factory=set)  # requests with work here
    step: tuple[str, ...] = ()  # who is blamed if it dies now
    step_bound_s: float = 0.0
    reserved_for: str | None = None  # a suspect that must run alone here
    is_killed: bool = False

    def heard(self, credits: Credits, seen: int, now: float) -> None:
        self.credits = credits
        self.last_heard_at = now
        self.is_killed = False  # it was only slow, or there is nobody to kill it
        while self.unseen and self.unseen[0][0] <= seen:
            self.unseen.popleft()

    @property
    def can_help(self) -> bool:
        """Whether it encodes and has nothing else to do."""
        return Role.ENCODE in self.roles and not self.holds and self.reserved_for is None and self.can_take(0)

    def can_take(self, slots: int) -> bool:
        free_requests = self.credits.requests - len(self.unseen)
        free_slots = self.credits.slots - sum(cost for _, cost in self.unseen)
        return not self.is_killed and free_requests > 0 and free_slots >= slots
