"""The language role: prefill and decode on one engine. What it does is what the dispatcher sends it.

Turns commands into sequences, lets the scheduler plan, runs one engine step at a time, and reports
tokens and KV.
"""

from __future__ import annotations

import math
import time

import torch

from mmserve import messages as m
from mmserve.engine.batch import StepResult
from mmserve.engine.runner import Runner
from mmserve.engine.sampler import prompt_logprobs, sample
from mmserve.engine.scheduler import Chunk, Plan, schedule
from mmserve.errors import BadRequest
from mmserve.kv.base import DEFAULT_BUDGET
from mmserve.kv.table import OutOfPages
from mmserve.request import FinishReason
from mmserve.sampling import Logprob, SamplingParams
from mmserve.transfer import LeaseReader, LeaseStore
from mmserve.workers.handoff import open_kv, publish_kv
from mmserve.workers.loop import Reporter, failed
from mmserve.workers.prompts import GrowingPrompt
from mmserve.workers.sequences import Prefill, Prefilled, Sequences, slots_of

Choice = tuple[int, dict[int, Logprob] | None]
Command = m.PrefillPrompt | m.ExtendPrompt | m.DecodeFrom
STEP_BOUND_S = 120.0
LOGPROB_ROWS = 256


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
        reader: LeaseReader,
        reporter: Reporter,
        token_budget: int,
    ) -> None:
        self.roles = roles
        self._runner = runner
        self._media_tokens = media_tokens
        self._eos_tokens = eos_tokens
        self._leases = leases
        self._reader = reader
        self._reporter = reporter
        self._token_budget = token_budget
        self._commands: list[tuple[Command, float]] = []
        self._sequences = Sequences(runner)
        self.capacity = self._offer(runner.most_pages, runner.places)

    # what can be taken

    def _offer(self, pages: int, places: int) -> m.Credits:
        """What fits into so many pages: each of the `requests` may round up to a page in every head."""
        table = self._runner.table
        free = max(pages, 0) // (table.layers * table.kv_heads)
        requests = max(min(places, max(free // 8, 1)), 0)
        return m.Credits(
            requests=requests, slots=max(free * table.page_size - requests * (table.page_size - 1), 0)
        )

    def credits(self) -> m.Credits:
        table, sequences = self._runner.table, self._sequences
        budget = self._token_budget
        promised = sum(table.pages_for(slots_of(command, budget)) for command, _ in self._commands)
        promised += sequences.promised_pages()
        coming = sum(not isinstance(command, m.ExtendPrompt) for command, _ in self._commands)
        places = self._runner.places - coming - len(sequences)
        return self._offer(self._runner.offered_pages - promised, places)

    # commands

    def handle(self, command: m.AnyCommand) -> None:
        if isinstance(command, Command):
            self._commands.append((command, time.perf_counter()))
        elif isinstance(command, m.CancelRequest):
            self._forget(command.request_id)
        elif isinstance(command, m.ReleaseLease):
            self._leases.release(command.lease_id)

    def _forget(self, name: str) -> None:
        self._commands = [entry for entry in self._commands if entry[0].request_id != name]
        self._sequences.forget(name)

    def _fail(self, command: Command, error: Exception, what: str) -> None:
        """One request cannot go on; the worker does."""
        self._forget(command.request_id)
        self._reporter.emit(failed(command.request_id, command.attempt, error, what))

    def _read(self, command: Command, received_at: float) -> None:
        sequences, runner = self._sequences, self._runner
        if isinstance(command, m.PrefillPrompt):
            prompt = GrowingPrompt(
                command,
                arrived=sequences.arrive(),
                received_at=received_at,
                media_tokens=self._media_tokens,
                num_layers=runner.table.layers,
                step_rows=self._token_budget,
                reader=self._reader,
            )
            sequences.wait_for_pages(prompt)
        elif isinstance(command, m.ExtendPrompt):
            self._extend(command)
        elif command.lease is not None:
            sequences.imports[command.request_id] = command
        elif sequences.awaits(command):
            sequences.begin_decode(command)
        else:
            raise BadRequest("Expected a prefilled sequence on this worker, but it is not here")

    def _extend(self, command: m.ExtendPrompt) -> None:
        """More of a prompt has come; of one that was cancelled, preempted or has failed nothing is wanted."""
        name = command.request_id
        prefill = self._sequences.prefills.get(name)
        prompt = prefill.prompt if prefill is not None else self._sequences.waiting.get(name)
        if prompt is None or prompt.command.attempt != command.attempt:
            return
        try:
            prompt.extend(command)
            if prefill is not None:
                self._load(prefill)
        except Exception as error:  # a bad part must not end the worker; it is logged and answered
            self._fail(command, error, "reading its media")

    def _load(self, prefill: Prefill) -> None:
        started_at = time.perf_counter()
        prefill.prompt.load(prefill.rows, self._runner)
        self._runner.advance(prefill.prompt.command.request_id)
        prefill.note_loaded(started_at, time.perf_counter())

    @torch.inference_mode()
    def _import(self) -> None:
        """Take in KV that was prefilled elsewhere, in turn, as long as its pages are there."""
        for command in self._sequences.imports_in_turn():
            self._reporter.announce((command.request_id,), STEP_BOUND_S)
            try:
                assert command.lease is not None, "what is imported lies in a lease"
                headroom = m.answer_slots(command.sampling, len(command.tokens))
                export = open_kv(command.lease, self._reader)
                self._runner.import_(command.request_id, export, headroom)
            except Exception as error:  # a bad lease must not end the worker; it is logged and answered
                self._fail(command, error, "reading its KV")
                continue
            del self._sequences.imports[command.request_id]
            self._sequences.begin_decode(command)

    # steps

    def step(self) -> bool:
        sequences = self._sequences
        while self._commands:
            command, received_at = self._commands.pop(0)
            self._reporter.announce((command.request_id,), STEP_BOUND_S)
            try:
                self._read(command, received_at)
            except Exception as error:  # a bad request must not end the worker; it is logged and answered
                # nothing of this command is here yet, and what is here may be a later attempt
                what = "reading its prompt"
                self._reporter.emit(failed(command.request_id, command.attempt, error, what))
        self._import()
        plan = schedule(sequences.state(self._token_budget))
        for name in plan.preempt:
            self._preempt(name)
        decodes = tuple(filter(self._has_room, plan.decodes))
        if plan.decodes and not decodes:
            # the plan counted on pages that are not there: one has to give way, or all would wait for ever
            self._preempt(plan.decodes[-1])
        plan = plan._replace(decodes=decodes)
        admitted = {name for name in plan.admit if self._admit(sequences.waiting.pop(name))}
        chunks = [
            self._run_from_where_it_is(chunk)
            for chunk in plan.chunks
            if chunk.sequence in admitted or chunk.sequence not in plan.admit
        ]
        plan = plan._replace(chunks=tuple(chunks))
        if not plan.decodes and not plan.chunks:
            return False
        self._reporter.announce((*plan.decodes, *(chunk.sequence for chunk in chunks)), STEP_BOUND_S)
        self._run(plan)
        return True

    def _has_room(self, name: str) -> bool:
        """Take the page that an answer's next token needs; without one it sits this step out."""
        try:
            self._runner.reserve(name, 1)
        except OutOfPages:
            return False
        return True

    def _run_from_where_it_is(self, chunk: Chunk) -> Chunk:
        """What was cached when the plan was made may have given way to who was admitted before."""
        rows = self._sequences.prefills[chunk.sequence].rows
        stop = min(rows.done + chunk.stop - chunk.start, rows.ready)
        return Chunk(chunk.sequence, rows.done, stop)

    def _preempt(self, name: str) -> None:
        """Give a sequence's pages to others; the dispatcher sends it again."""
        attempt = self._sequences.command(name).attempt
        self._forget(name)
        self._reporter.emit(m.RequestPreempted(request_id=name, attempt=attempt))

    def _admit(self, prompt: GrowingPrompt) -> bool:
        name = prompt.command.request_id
        started_at = time.perf_counter()
        self._reporter.announce((name,), STEP_BOUND_S)
        try:
            rows = prompt.begin(self._runner)
            self._runner.add(
                name,
                rows,
                headroom=prompt.headroom,
                identity=prompt.identity,
                most_cached=prompt.most_cached,
            )
            transferred_at = time.perf_counter()
            # a method that acts on the embeddings acts here: this is part of prefill
            self._runner.advance(name)
        except OutOfPages:  # another one was admitted with pages this one counted on: it waits on
            self._runner.release(name)
            self._sequences.waiting[name] = prompt
            return False
        except Exception as error:  # a bad request must not end the worker; it is logged and answered
            self._fail(prompt.command, error, "reading its media")
            return False
        self._sequences.prefills[name] = Prefill(
            prompt=prompt,
            rows=rows,
            layers=self._runner.table.layers,
            queue_ms=(started_at - prompt.received_at) * 1e3,
            transfer_ms=(transferred_at - started_at) * 1e3,
            started_at=transferred_at,
            stalled_at=transferred_at if rows.done == rows.ready else None,
        )
        return True

    def _run(self, plan: Plan) -> None:
        """One step. An error in the model fails every request in it, one after the model only its own."""
        sequences = self._sequences
        rows = {name: sequences.decodes[name].row for name in plan.decodes}
        try:
            result = self._runner.run(plan, rows)
            for chunk in plan.chunks:
                if chunk.sequence in result.prompt_hidden:
                    self._note_logprobs(chunk, result.prompt_hidden[chunk.sequence])
        except Exception as error:
            for name in (*plan.decodes, *(chunk.sequence for chunk in plan.chunks)):
                self._fail(sequences.command(name), error, "a step of the model")
            return
        chosen = self._sample(result)
        going_on = [name for name in plan.decodes if name in chosen]
        sampled = [token for name in going_on if (token := self._advance(name, *chosen[name]))]
        if sampled:
            self._reporter.emit(m.TokensDecoded(tokens=tuple(sampled)))
        now = time.perf_counter()
        for name in (chunk.sequence for chunk in plan.chunks if chunk.sequence in sequences.prefills):
            prefill = sequences.prefills[name]
            try:
                if prefill.rows.failure is not None:
                    raise prefill.rows.failure
                if name in chosen:
                    self._finish_prompt(prefill, *chosen[name])
                    continue
                self._runner.advance(name)
                if prefill.rows.done == prefill.rows.ready:
                    prefill.stalled_at = now
            except OutOfPages:  # to compress its KV takes some more, for a moment
                self._preempt(name)
            except Exception as error:
                self._fail(prefill.prompt.command, error, "finishing its prompt")

    def _sample(self, result: StepResult) -> dict[str, Choice]:
        """The next token of each sequence; where it is fed known tokens, the choice counts for nothing."""
        sequences = self._sequences
        rows = [sequences.sampler_row(name, self._eos_tokens) for name in result.names]
        chosen = dict(zip(result.names, sample(result.logits, rows), strict=True))
        for name, best in zip(result.names, result.logits.amax(-1).tolist(), strict=True):
            if not math.isfinite(best):
                del chosen[name]
                error = ArithmeticError(f"the best score of the next token is {best}")
                self._fail(sequences.command(name), error, "choosing its next token")
        return chosen

    def _note_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Row i tells how likely the token of row i + 1 was. A few rows at a time: scores are wide."""
        prefill = self._sequences.prefills[chunk.sequence]
        prompt, asked = prefill.prompt, prefill.prompt.command.sampling.prompt_logprobs
        last = min(chunk.stop, len(prompt) - 1)
        for start in range(chunk.start, last, LOGPROB_ROWS):
            stop = min(start + LOGPROB_ROWS, last)
            logits = self._runner.logits(hidden[start - chunk.start : stop - chunk.start])
            targets = torch.from_numpy(prompt.token_ids[start + 1 : stop + 1])
            found = prompt_logprobs(logits, targets.to(logits.device), asked or 0)
            where = prompt.order[start + 1 : stop + 1].tolist()
            prefill.logprobs.update(zip(where, found, strict=True))

    def _advance(self, name: str, token: int, logprobs: dict[int, Logprob] | None) -> m.Sampled | None:
        """Feed the next known token, or report a new one; None while forced tokens are replayed."""
        decode = self._sequences.decodes[name]
        decode.fed += 1
        if decode.fed < len(decode.tokens):
            return None
        command = decode.command
        sampled = self._sampled(command, len(decode.tokens), token, logprobs, command.sampling)
        if sampled.finish is not None:
            # the next turn of this conversation begins with what is in the cache now
            if (identity := self._sequences.whole_identity(name)) is not None:
                self._runner.remember(name, identity)
            self._forget(name)
        else:
            decode.tokens.append(token)
        return sampled

    def _sampled(
        self,
        command: m.PrefillPrompt | m.DecodeFrom,
        seq: int,
        token: int,
        logprobs: dict[int, Logprob] | None,
        sampling: SamplingParams,
    ) -> m.Sampled:
        finish = None
        if (token in self._eos_tokens and not sampling.ignore_eos) or token in sampling.stop_token_ids:
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

    def _finish_prompt(self, prefill: Prefill, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """Report the first token, share and compress the KV, and hand it off or keep it."""
        command, runner, prompt = prefill.prompt.command, self._runner, prefill.prompt
        name = command.request_id
        first = None if command.forced else self._sampled(command, 0, token, logprobs, command.sampling)
        before = runner.kv_bytes_of(len(prompt))
        runner.remember(name, prompt.shared_identity)
        if prompt.policy is not None:
            budget = command.methods.kv_budget or DEFAULT_BUDGET
            runner.compress(name, prompt.policy, budget, prompt.identity)
        after, slots = runner.kv_bytes(name), int(runner.table.lengths(name).max())
        is_over = first is not None and first.finish is not None
        if not (command.hand_off or is_over):
            runner.hold(name, prompt.headroom)
        runner.finish_prompt(name)
        del self._sequences.prefills[name]
        prefilled_at = time.perf_counter()
        lease = None
        if command.hand_off and not is_over:
            lease = publish_kv(runner.export(name), self._leases, owner=name)
        if command.hand_off or is_over:
            runner.release(name)
        else:
            # the prefix cache holds floats: what answers add to it has to be floats too
            is_shared = prompt.is_shared and not runner.has_answer_pages
            identity = prompt.identity if is_shared else None
            self._sequences.prefilled[name] = Prefilled(prompt=prompt, identity=identity)
        self._reporter.emit(
            m.PromptPrefilled(
                request_id=name,
                attempt=command.attempt,
                first=first,
                lease=lease,
                next_order=prompt.length,
                next_position=int(prompt.position[-1]) + 1,
                slots=slots,
                kv_bytes=after,
                kv_bytes_uncompressed=before,
                kv_bytes_dense=runner.kv_bytes_of(prompt.length),
                cached_slots=prefill.rows.cached,
                visual_by_layer=prefill.visual_by_layer,
                visual_lasting=prompt.visual_lasting,
                survivors=prefill.survivors,
                attention_density=prefill.attention_density,
                attention=prefill.attention,
                prompt_logprobs=prefill.prompt_logprobs,
                queue_ms=prefill.queue_ms,
                transfer_ms=prefill.transfer_ms + (time.perf_counter() - prefilled_at) * 1e3,
                prefill_ms=(prefilled_at - prefill.started_at) * 1e3 - prefill.stalled_ms,
            )
        )
