"""The language role: prefill and decode on one engine. What it does is what the dispatcher sends it.

Turns commands into sequences, runs one engine step at a time, and reports tokens and KV.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mmserve import messages as m
from mmserve.engine.plan import Pending, Plan, plan_step
from mmserve.engine.runner import DecodeRow, PromptRows, Runner
from mmserve.engine.sampler import sample
from mmserve.errors import BadRequest
from mmserve.kv.base import DEFAULT_BUDGET, load_policy
from mmserve.kv.store import KVExport
from mmserve.models.layout.llava_onevision import expand, survivors
from mmserve.request import FinishReason
from mmserve.sampling import SamplingParams
from mmserve.tensors import tensors_of, to_numpy
from mmserve.transfer import LeaseStore, open_lease
from mmserve.wire import Array, TypedArray
from mmserve.workers.loop import Reporter, failed

TOKEN_BUDGET = 2048  # rows per step
MAX_RUNNING = 64
STEP_BOUND_S = 120.0
LEASE_TTL_S = 600.0


@dataclass(slots=True, kw_only=True)
class _Prefill:
    command: m.PrefillPrompt
    rows: PromptRows
    uncompressed: int  # prompt tokens before reduction
    queue_ms: float
    transfer_ms: float
    started_at: float


@dataclass(slots=True, kw_only=True)
class _Decode:
    """A running answer: `tokens` are known, those before `fed` are in the cache."""

    command: m.DecodeFrom
    tokens: list[int]
    fed: int = 0

    @property
    def row(self) -> DecodeRow:
        start = self.command
        return DecodeRow(self.tokens[self.fed], start.next_order + self.fed, start.next_position + self.fed)


@dataclass(slots=True)
class _Queues:
    commands: list[tuple[m.PrefillPrompt | m.DecodeFrom, float]] = field(default_factory=list)
    prefills: dict[str, _Prefill] = field(default_factory=dict)
    decodes: dict[str, _Decode] = field(default_factory=dict)
    # most pages each sequence here may come to hold, from its admission until it is forgotten
    pages: dict[str, int] = field(default_factory=dict)


class LanguageHandler:
    """Sequences by request id; each `step` runs one plan of the engine."""

    def __init__(
        self,
        *,
        runner: Runner,
        roles: tuple[m.Role, ...],
        media_tokens: tuple[int, int],
        eos_tokens: tuple[int, ...],
        leases: LeaseStore,
        lease_directories: Sequence[Path],
        reporter: Reporter,
    ) -> None:
        self.roles = roles
        self._runner = runner
        self._media_tokens = media_tokens
        self._eos_tokens = eos_tokens
        self._leases = leases
        self._lease_directories = lease_directories
        self._reporter = reporter
        self._queues = _Queues()
        self.capacity = self._offer(runner.table.num_pages, MAX_RUNNING)

    def _offer(self, pages: int, places: int) -> m.Credits:
        """What fits into so many pages: each of the `requests` may round up to a page in every head."""
        table = self._runner.table
        free = max(pages, 0) // (table.layers * table.kv_heads)
        requests = min(places, max(free // 8, 1))
        return m.Credits(
            requests=requests, slots=max(free * table.page_size - requests * (table.page_size - 1), 0)
        )

    def credits(self) -> m.Credits:
        table, queues = self._runner.table, self._queues
        waiting = [command for command, _ in queues.commands]
        promised = sum(queues.pages.values()) + sum(table.pages_for(_cost(command)) for command in waiting)
        known = queues.pages.keys() | {command.request_id for command in waiting}
        return self._offer(table.num_pages - promised, MAX_RUNNING - len(known))

    def handle(self, command: m.AnyCommand) -> None:
        if isinstance(command, m.PrefillPrompt | m.DecodeFrom):
            self._queues.commands.append((command, time.perf_counter()))
        elif isinstance(command, m.CancelRequest):
            self._forget(command.request_id)
        elif isinstance(command, m.ReleaseLease):
            self._leases.release(command.lease_id)

    def _forget(self, request_id: str) -> None:
        queues = self._queues
        queues.commands = [entry for entry in queues.commands if entry[0].request_id != request_id]
        queues.prefills.pop(request_id, None)
        queues.decodes.pop(request_id, None)
        self._release(request_id)

    def _release(self, name: str) -> None:
        self._queues.pages.pop(name, None)
        self._runner.release(name)

    def _fail(self, command: m.PrefillPrompt | m.DecodeFrom, error: Exception, what: str) -> None:
        """One request cannot go on; the worker does."""
        self._forget(command.request_id)
        self._reporter.emit(failed(command.request_id, command.attempt, error, what))

    def step(self) -> bool:
        queues = self._queues
        while queues.commands:
            self._guarded(*queues.commands.pop(0))
        pending = [Pending(name, p.rows.done, len(p.rows)) for name, p in queues.prefills.items()]
        plan = plan_step(pending, tuple(queues.decodes), TOKEN_BUDGET)
        if not plan.decodes and not plan.chunks:
            return False
        names = (*plan.decodes, *(chunk.sequence for chunk in plan.chunks))
        self._reporter.announce(names, STEP_BOUND_S)
        self._run(plan)
        return True

    def _guarded(self, command: m.PrefillPrompt | m.DecodeFrom, received_at: float) -> None:
        try:
            if isinstance(command, m.PrefillPrompt):
                self._add_prompt(command, received_at)
            else:
                self._add_decode(command)
        except Exception as error:  # a bad request must not end the worker; it is logged and answered
            self._fail(command, error, "reading its prompt")

    @torch.inference_mode()
    def _add_prompt(self, command: m.PrefillPrompt, received_at: float) -> None:
        started_at = time.perf_counter()
        layout = expand(command.token_ids, [item.tokens for item in command.items], self._media_tokens)
        kept, visual = [], []
        for item in command.items:
            arrays = tensors_of(item.lease, open_lease(item.lease, self._lease_directories))
            kept.append(arrays["source"].numpy())
            visual.append(arrays["embeddings"])
        rows = survivors(layout, kept)
        if len(rows.order) == 0:
            raise BadRequest("Expected a prompt of at least one token, but it is empty")
        embeddings = self._runner.embed(layout.token_ids[rows.order])
        if visual:
            embeddings[torch.from_numpy(rows.is_visual)] = torch.cat(visual).to(embeddings)
        prompt = PromptRows(
            embeddings=embeddings, order=rows.order, position=rows.position, is_visual=rows.is_visual
        )
        transferred_at = time.perf_counter()
        self._runner.add(command.request_id, prompt)
        self._queues.pages[command.request_id] = self._runner.table.pages_for(
            len(prompt) + command.sampling.max_tokens
        )
        self._queues.prefills[command.request_id] = _Prefill(
            command=command,
            rows=prompt,
            uncompressed=len(layout.token_ids),
            queue_ms=(started_at - received_at) * 1e3,
            transfer_ms=(transferred_at - started_at) * 1e3,
            started_at=transferred_at,
        )

    @torch.inference_mode()
    def _add_decode(self, command: m.DecodeFrom) -> None:
        if command.lease is not None:
            arrays = open_lease(command.lease, self._lease_directories)
            tensors = tensors_of(command.lease, arrays)
            export = KVExport(
                lengths=arrays["lengths"].astype(np.int32, copy=False),
                order=arrays["order"].astype(np.int32, copy=False),
                position=arrays["position"].astype(np.int32, copy=False),
                k=tensors["k"],
                v=tensors["v"],
            )
            self._runner.store.import_(self._runner.table, command.request_id, export)
            self._promise(command.request_id, command.sampling)
        elif command.request_id not in self._runner.table:
            raise BadRequest("Expected a prefilled sequence on this worker, but it is not here")
        self._queues.decodes[command.request_id] = _Decode(command=command, tokens=list(command.tokens))

    def _promise(self, name: str, sampling: SamplingParams) -> None:
        """Hold back the pages that the answer to a prefilled prompt may still need."""
        table = self._runner.table
        pages = -(-(table.lengths(name) + sampling.max_tokens) // table.page_size)
        self._queues.pages[name] = int(pages.sum())

    def _run(self, plan: Plan) -> None:
        """One step. An error in the model fails every request in it, one after the model only its own."""
        queues = self._queues
        commands = {name: queues.decodes[name].command for name in plan.decodes} | {
            chunk.sequence: queues.prefills[chunk.sequence].command for chunk in plan.chunks
        }
        try:
            logits = self._runner.run(plan, {name: queues.decodes[name].row for name in plan.decodes})
        except Exception as error:
            for command in commands.values():
                self._fail(command, error, "a step of the model")
            return
        sampled = []
        for name in plan.decodes:
            try:
                token = self._advance(name, logits[name])
            except Exception as error:
                self._fail(commands[name], error, "choosing its next token")
                continue
            if token is not None:
                sampled.append(token)
        if sampled:
            self._reporter.emit(m.TokensDecoded(tokens=tuple(sampled)))
        for name in (chunk.sequence for chunk in plan.chunks if chunk.sequence in logits):
            try:
                self._finish_prompt(queues.prefills.pop(name), logits[name])
            except Exception as error:
                self._fail(commands[name], error, "finishing its prompt")

    def _advance(self, name: str, logits: torch.Tensor) -> m.Sampled | None:
        """Feed the next known token, or sample a new one; None while forced tokens are replayed."""
        decode = self._queues.decodes[name]
        decode.fed += 1
        if decode.fed < len(decode.tokens):
            return None
        command = decode.command
        token = self._sample(command, logits, len(decode.tokens), command.sampling)
        decode.tokens.append(token.token_id)
        if token.finish is not None:
            del self._queues.decodes[name]
            self._release(name)
        return token

    def _sample(
        self,
        command: m.PrefillPrompt | m.DecodeFrom,
        logits: torch.Tensor,
        seq: int,
        sampling: SamplingParams,
    ) -> m.Sampled:
        token, logprobs = sample(logits, sampling, seq)
        finish = None
        if token in self._eos_tokens and not sampling.ignore_eos:
            finish = FinishReason.STOP
        elif seq + 1 >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        return m.Sampled(
            request_id=command.request_id,
            attempt=command.attempt,
            seq=seq,
            token_id=token,
            logprobs=logprobs,
            finish=finish,
        )

    def _finish_prompt(self, prefill: _Prefill, logits: torch.Tensor) -> None:
        """Sample the first token, compress the KV, and hand it off or keep it."""
        command, runner = prefill.command, self._runner
        name = command.request_id
        first = None if command.forced else self._sample(command, logits, 0, command.sampling)
        before = runner.kv_bytes(name)
        if command.methods.kv != "none":
            budget = command.methods.kv_budget
            runner.compress(
                name, load_policy(command.methods.kv), DEFAULT_BUDGET if budget is None else budget
            )
        after, slots = runner.kv_bytes(name), int(runner.table.lengths(name).max())
        runner.finish_prompt(name)
        prefilled_at = time.perf_counter()
        lease = None
        is_over = first is not None and first.finish is not None
        if command.hand_off and not is_over:
            lease = self._publish(name)
        if command.hand_off or is_over:
            self._release(name)
        else:
            self._promise(name, command.sampling)
        self._reporter.emit(
            m.PromptPrefilled(
                request_id=name,
                attempt=command.attempt,
                first=first,
                lease=lease,
                next_order=prefill.uncompressed,
                next_position=int(prefill.rows.position[-1]) + 1,
                slots=slots,
                kv_bytes=after,
                kv_bytes_uncompressed=before,
                queue_ms=prefill.queue_ms,
                transfer_ms=prefill.transfer_ms + (time.perf_counter() - prefilled_at) * 1e3,
                prefill_ms=(prefilled_at - prefill.started_at) * 1e3,
            )
        )

    def _publish(self, name: str) -> m.Lease:
        export = self._runner.export(name)
        arrays: dict[str, Array | TypedArray] = {
            "lengths": export.lengths,
            "order": export.order,
            "position": export.position,
            "k": to_numpy(export.k),
            "v": to_numpy(export.v),
        }
        return self._leases.publish(arrays, ttl_s=LEASE_TTL_S, owner=name)


def _cost(command: m.PrefillPrompt | m.DecodeFrom) -> int:
    """Slots per head that a waiting command takes at most; a sequence that is here has its promise."""
    if isinstance(command, m.PrefillPrompt):
        text = len(command.token_ids) - len(command.items)
        return text + sum(item.kept for item in command.items) + command.sampling.max_tokens
    return 0 if command.lease is None else command.next_position + command.sampling.max_tokens
