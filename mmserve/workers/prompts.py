"""From a prefill command to the rows that are run, and to what tells their KV apart from all other.

A prompt grows: its items are encoded part by part, and what stands before the first missing part can be
run. Embeddings are read from when a prompt is admitted: many may wait, and theirs would fill the memory.
Knows nothing about scheduling or steps.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mmserve import messages as m
from mmserve.engine.groups import LayerGroups
from mmserve.engine.probe import rows_after
from mmserve.engine.rows import PromptRows, first_visual, most_cached, row_after, rows_ready
from mmserve.engine.runner import Runner
from mmserve.errors import BadRequest, WireError
from mmserve.kv.base import KVPolicy, make_policy
from mmserve.kv.identity import KEY_BYTES, WORDS, Identity, identity_rows
from mmserve.methods import CARRIERS, inner_part
from mmserve.models.layout import Rows, Walk
from mmserve.pruning.carriers import FOREVER
from mmserve.pruning.inner import InnerReducer, make_reducer
from mmserve.request import Methods
from mmserve.transfer import LeaseReader
from mmserve.wire import Array
from mmserve.workers.handoff import columns_of, open_embeddings
from mmserve.workers.lasting import lasting_of, most_slots
from mmserve.workers.numbering import FrameNumbers
from mmserve.workers.patterns import attention_settings, pattern_of, prompt_pattern

MAX_PROMPT_LOGPROBS = 1 << 14  # reported candidates of a prompt: they travel in one message


class _Piece(NamedTuple):
    """Rows that were laid out together: text, or those of the part in `lease`."""

    start: int
    stop: int
    lease: m.Lease | None


class _Item:
    """What has come of an item and is not laid out yet."""

    def __init__(self, item: m.PromptItem) -> None:
        self.parts = deque(item.parts)
        self.is_whole = item.is_whole


class GrowingPrompt:
    """A prompt from its beginning to the first part that is missing.

    `arrived` numbers the commands of this worker, `step_rows` is how many rows it runs in a step at most.
    """

    def __init__(
        self,
        command: m.PrefillPrompt,
        *,
        arrived: int,
        received_at: float,
        media_tokens: tuple[int, int],
        num_layers: int,
        step_rows: int,
        reader: LeaseReader,
    ) -> None:
        """Lay out what is there; raises what is wrong with it."""
        self.command = command
        self.arrived = arrived
        self.received_at = received_at
        self._reader = reader
        self._walk = Walk(command.token_ids, len(command.items), media_tokens)
        self._items = [_Item(item) for item in command.items]
        # most rows that it can have
        self.capacity = (
            len(command.token_ids) - len(command.items) + sum(item.keep_bound for item in command.items)
        )
        if self.capacity <= 0:
            raise BadRequest("Expected a prompt of at least one token, but it is empty")
        self.policy = _policy(command.methods)
        probe = None if self.policy is None else self.policy.probe()
        self.is_probed = probe is not None
        self._is_watched = self.policy is not None and self.policy.observer() is not None and probe is None
        # rows that a probe runs after the prompt lie behind it for a while
        self.slots = most_slots(command, step_rows) + rows_after(probe, self.capacity)
        self._lasting = lasting_of(command.methods, self.capacity)
        self._token_ids = np.empty(self.capacity, np.int64)
        self._order = np.empty(self.capacity, np.int32)
        self._position = np.empty(self.capacity, np.int32)
        self._is_visual = np.empty(self.capacity, np.bool_)
        self._item = np.full(self.capacity, -1, np.int32)  # and the frame, of every visual row
        self._frame = np.full(self.capacity, -1, np.int32)
        self._patch = np.full(self.capacity, -1, np.int64)  # the item, and where in its frame
        self._frame_numbers = FrameNumbers()
        self._is_fixed = np.zeros(self.capacity, np.bool_)  # a newline that ends an item, or of a guarded one
        self._identity = np.empty((self.capacity, WORDS), np.uint64)
        self.pattern = pattern_of(command.methods)
        self.reducer = _reducer(command, num_layers, self.policy)
        acting = () if self.reducer is None else self.reducer.layers(num_layers)
        self._acts_on_embeddings = acting[:1] == (0,)
        self._acts_between_layers = acting[-1:] > (0,)
        self._check_inner()
        self._known: Identity | None = None  # of the rows so far: it remembers its hashes
        self._pieces: list[_Piece] = []
        self._loaded = 0  # pieces whose embeddings were read
        self._rows = 0
        self._grow()

    def __len__(self) -> int:
        return self._rows

    @property
    def is_whole(self) -> bool:
        return self._walk.is_over

    @property
    def length(self) -> int:
        """Tokens of the uncompressed prompt so far."""
        return self._walk.length

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The token of every row."""
        return self._token_ids[: self._rows]

    @property
    def order(self) -> NDArray[np.int32]:
        """The index of every row in the uncompressed prompt."""
        return self._order[: self._rows]

    @property
    def position(self) -> NDArray[np.int32]:
        """The RoPE position of every row."""
        return self._position[: self._rows]

    @property
    def is_visual(self) -> NDArray[np.bool_]:
        return self._is_visual[: self._rows]

    @property
    def until(self) -> NDArray[np.int32] | None:
        """The first order that does not see a row, of every row; None where all are seen for ever."""
        return None if self._lasting is None else self._lasting.until[: self._rows]

    @property
    def visual_lasting(self) -> int | None:
        """How many visual rows last; None where all do."""
        return None if self.until is None else int((self.is_visual & (self.until == FOREVER)).sum())

    @property
    def headroom(self) -> int:
        """Slots for the answer that are taken with those of the prompt, so that they lie behind them."""
        command = self.command
        return 0 if command.hand_off else m.answer_slots(command.sampling, len(command.forced))

    @property
    def ready(self) -> int:
        """How many leading rows may be run now."""
        if self._acts_on_embeddings and not self.is_whole:
            return 0
        return rows_ready(len(self), is_whole=self.is_whole, is_observed=self.is_observed)

    @property
    def most_cached(self) -> int:
        """How many leading slots may come from the prefix cache."""
        if self.wants_logits:
            return 0
        most = self.ready
        if self.is_whole:
            most = most_cached(self.is_visual, is_observed=self.is_observed)
        # an inner method lets the KV of what follows depend on the question, and needs its hidden states;
        # what a KV policy gathers of the rows from there on is not cached
        if self._shares_text_only or self._is_watched:
            most = min(most, first_visual(self.is_visual))
        return most if self.until is None else int((self.until[:most] == FOREVER).sum())

    def row_after(self, slots: int) -> int:
        """The row at which it begins when so many slots are cached."""
        return row_after(slots, self.until)

    @property
    def is_observed(self) -> bool:
        return self._acts_between_layers or (self.policy is not None and self.policy.needs_query)

    @property
    def is_shared(self) -> bool:
        """Whether the KV of an answer to it may be another prompt's beginning."""
        return not self._shares_text_only and self.command.methods.kv == "none"

    @property
    def _shares_text_only(self) -> bool:
        """Whether only what stands before the first item has the KV of every prompt that begins so."""
        return self.reducer is not None or (self._lasting is not None and self._lasting.is_limited)

    @property
    def wants_logits(self) -> bool:
        return self.command.sampling.prompt_logprobs is not None

    @property
    def identity(self) -> Identity:
        """What every lasting row holds."""
        if self._known is None:
            salt, settings = self.command.salt.encode(), _settings(self.command.methods)
            rows = self._identity[: self._rows]
            self._known = Identity(
                salt, settings, rows if self.until is None else rows[self.until == FOREVER]
            )
        return self._known

    @property
    def shared_identity(self) -> Identity:
        """What the rows hold whose KV other prompts may take over."""
        known = self.identity
        if not self._shares_text_only:
            return known
        return Identity(known.salt, known.settings, known.rows[: first_visual(self.is_visual)])

    # growing

    def extend(self, command: m.ExtendPrompt) -> None:
        """Take the next part of an item."""
        item = self._items[command.item]
        item.parts.append(command.part)
        item.is_whole = command.is_last
        self._grow()

    def _grow(self) -> None:
        walk = self._walk
        self._add_text()
        while not walk.is_over:
            item = self._items[walk.item]
            while item.parts:
                self._add_part(item.parts.popleft())
            if not item.is_whole:
                return
            self._is_fixed[self._rows - 1] = True
            walk.leave_item()
            self._add_text()
        self._check_logprobs()

    def _add_text(self) -> None:
        rows = self._walk.text()
        if len(rows):
            self._add(rows, rows.token_ids, np.zeros((len(rows), KEY_BYTES), np.uint8), None)

    def _add_part(self, part: m.EncodedPart) -> None:
        arrays = self._reader.open(part.lease, columns_of(part.lease))
        item, frame = self._walk.item, _column(arrays, "frame")
        rows = self._walk.part(part.tokens, _column(arrays, "source"))
        if self._lasting is not None:
            self._lasting.add(
                self._rows,
                rows.order,
                frame,
                lambda: open_embeddings(part.lease, self._reader, torch.empty(0)),
            )
        self._add(rows, _column(arrays, "index"), arrays["key"].astype(np.uint8, copy=False), part.lease)
        here = slice(self._rows - len(rows), self._rows)
        self._is_fixed[here] = part.guarded
        self._item[here], self._frame[here] = item, self._frame_numbers.of_part(item, frame)
        source = _column(arrays, "source").astype(np.int64)
        self._patch[here] = (item << 32) + (source % part.frame_tokens if part.frame_tokens else source)

    def _add(
        self, rows: Rows, held: NDArray[np.integer[Any]], keys: NDArray[np.uint8], lease: m.Lease | None
    ) -> None:
        start, stop = self._rows, self._rows + len(rows)
        if stop > self.capacity:
            raise WireError(f"Expected a prompt of at most {self.capacity} rows, but got {stop}")
        here = slice(start, stop)
        self._token_ids[here] = rows.token_ids
        self._order[here] = rows.order
        # survivors and what follows keep their places: where and when a token was is in its position
        self._position[here] = rows.order
        self._is_visual[here] = rows.is_visual
        self._identity[here] = identity_rows(
            held=held, keys=keys, order=self._order[here], position=self._position[here]
        )
        self._pieces.append(_Piece(start, stop, lease))
        self._rows, self._known = stop, None

    def _check_inner(self) -> None:
        if self.reducer is not None and self.is_probed:
            raise BadRequest(
                f"Expected no prune {self.command.methods.prune} with kv {self.command.methods.kv}, "
                "which runs rows after the prompt through all layers"
            )
        asked = self.command.sampling.prompt_logprobs
        if asked is not None and self.reducer is not None:
            raise BadRequest(
                f"Expected no prompt_logprobs with {self._reduces}, but got {asked}: "
                "not every token passes all layers"
            )

    @property
    def _reduces(self) -> str:
        """Which method thins out tokens inside the model."""
        methods = self.command.methods
        return f"prune {methods.prune}" if inner_part(methods) is not None else f"kv {methods.kv}"

    def _check_logprobs(self) -> None:
        asked = self.command.sampling.prompt_logprobs
        if asked is not None and self.length * (asked + 1) > MAX_PROMPT_LOGPROBS:
            raise BadRequest(
                f"Expected prompt_logprobs of at most {MAX_PROMPT_LOGPROBS} candidates in total, "
                f"but got {self.length} tokens with {asked + 1} each"
            )

    # running

    @torch.inference_mode()
    def begin(self, runner: Runner) -> PromptRows:
        """What the runner runs, as far as it is there. Begun again where there were no pages for it."""
        self._loaded = 0
        layers = runner.table.layers
        groups = None if self.reducer is None else LayerGroups.of(self.reducer, layers)
        rows = PromptRows(
            embeddings=runner.new_rows(self.capacity),
            order=self.order,
            position=self.position,
            is_visual=self.is_visual,
            most_slots=self.slots,
            groups=groups,
            pattern=prompt_pattern(self.command, self.pattern, self.capacity, runner),
            observer=self.policy.observer() if self.policy is not None and self._is_watched else None,
            is_whole=False,
            is_observed=self.is_observed,
            wants_logits=self.wants_logits,
        )
        self.load(rows, runner)
        return rows

    @torch.inference_mode()
    def load(self, rows: PromptRows, runner: Runner) -> None:
        """Add what has come since: read the media's embeddings from their leases, look up those of text."""
        for start, stop, lease in self._pieces[self._loaded :]:
            if lease is None:
                rows.embeddings[start:stop] = runner.embed(self._token_ids[start:stop])
            else:
                rows.embeddings[start:stop] = open_embeddings(lease, self._reader, rows.embeddings)
        self._loaded = len(self._pieces)
        rows.order, rows.position, rows.is_visual = self.order, self.position, self.is_visual
        rows.item, rows.frame = self._item[: self._rows], self._frame[: self._rows]
        rows.until = self.until
        rows.is_reducible = self.is_visual & ~self._is_fixed[: self._rows]
        rows.patch = self._patch[: self._rows]
        rows.is_whole = self.is_whole


def _reducer(command: m.PrefillPrompt, num_layers: int, policy: KVPolicy | None) -> InnerReducer | None:
    """The method that acts inside the model, where there is anything to act on."""
    inner = inner_part(command.methods)
    own = None if policy is None else policy.reducer()
    if not command.items:
        return None
    if inner is not None and own is not None:
        raise BadRequest(
            f"Expected no prune {command.methods.prune} with kv {command.methods.kv}, since both act inside "
            "the model"
        )
    if own is not None and command.methods.prune in CARRIERS:
        raise BadRequest(
            f"Expected no kv {command.methods.kv}, which acts inside the model, with prune "
            f"{command.methods.prune}, which says itself what every token sees"
        )
    reducer = own if inner is None else make_reducer(inner.name, inner.keep, **inner.options)
    return reducer if reducer is not None and reducer.layers(num_layers) else None


def _policy(methods: Methods) -> KVPolicy | None:
    """What chooses which KV stays; raises BadRequest where its settings are wrong."""
    return None if methods.kv == "none" else make_policy(methods.kv, **methods.kv_options)


def _column(arrays: dict[str, Array], name: str) -> NDArray[np.int32]:
    return arrays[name].astype(np.int32, copy=False)


def _settings(methods: Methods) -> bytes:
    """What changes the KV of a prompt before a KV policy acts, but for what the keys of its media tell."""
    pruning = f"{methods.prune} {inner_part(methods)} {sorted(methods.prune_options.items())}"
    return f"{pruning} {attention_settings(methods)} {methods.kv_dtype}".encode()
