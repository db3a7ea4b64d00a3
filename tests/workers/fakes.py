"""A language handler on a tiny random decoder in this process, and a reporter that remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from mmserve import messages as m
from mmserve.engine.quantized import QuantizedRunner
from mmserve.engine.runner import Runner
from mmserve.kernels.kv_codec.pages import Kind
from mmserve.kv.identity import KEY_BYTES
from mmserve.kv.quantized import QuantizedStore
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import DecoderConfig, TextDecoder
from mmserve.request import Methods
from mmserve.sampling import SamplingParams
from mmserve.transfer import LeaseStore, MappedLeases
from mmserve.wire import Array, TypedArray
from mmserve.workers.language import LanguageHandler
from mmserve.workers.loop import Handler

VOCAB, WIDTH, IMAGE, VIDEO, EOS = 60, 16, 50, 51, 52
BOTH = (m.Role.PREFILL, m.Role.DECODE)
E = TypeVar("E", bound=m.AnyEvent)


def tiny_decoder(seed: int = 0, layers: int = 2) -> TextDecoder:
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tied=False,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )
    decoder = TextDecoder(config).eval()
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return decoder


@dataclass
class FakeReporter:
    """What the worker's loop would send, with the credits that would go along."""

    events: list[m.AnyEvent] = field(default_factory=list)
    credits: list[m.Credits] = field(default_factory=list)
    announced: list[tuple[str, ...]] = field(default_factory=list)
    handler: Handler | None = None

    def emit(self, event: m.AnyEvent) -> None:
        self.events.append(event)
        if self.handler is not None:
            self.credits.append(self.handler.credits())

    def announce(self, requests: tuple[str, ...], bound_s: float) -> None:
        assert bound_s > 0
        self.announced.append(requests)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


def whole(*parts: m.EncodedPart) -> m.PromptItem:
    return m.PromptItem(parts=parts, is_whole=True, keep_bound=sum(part.kept for part in parts))


class Engine:
    """One language worker without its process, loop and socket."""

    def __init__(
        self,
        directory: Path,
        *,
        pages: int = 400,
        page_size: int = 4,
        roles: tuple[m.Role, ...] = BOTH,
        decoder: TextDecoder | None = None,
        token_budget: int = 2048,
        codec: Kind | None = None,
        places: int = 64,
    ) -> None:
        self.leases = LeaseStore([directory])
        self.reporter = FakeReporter()
        decoder = decoder or tiny_decoder()
        layers, decodes = decoder.config.layers, m.Role.DECODE in roles
        floats = 0 if codec and m.Role.PREFILL not in roles else pages
        self.table = PageTable(layers, 2, floats, page_size)
        store, cpu = PageStore(floats, page_size, 8), torch.device("cpu")
        self.runner = Runner(decoder, self.table, store, cpu, codec)
        if codec and decodes:
            answers = PageTable(layers, 2, pages, page_size)
            quantized = QuantizedStore(codec, answers, places, 8, torch.float32)
            self.runner = QuantizedRunner(decoder, self.table, store, cpu, quantized)
        self.handler = LanguageHandler(
            runner=self.runner,
            roles=roles,
            media_tokens=(IMAGE, VIDEO),
            eos_tokens=(EOS,),
            leases=self.leases,
            reader=MappedLeases([directory]),
            reporter=self.reporter,
            token_budget=token_budget,
        )
        self.reporter.handler = self.handler
        self.sampling: dict[str, SamplingParams] = {}
        self.methods: dict[str, Methods] = {}
        self.forced: dict[str, tuple[int, ...]] = {}

    @property
    def used_pages(self) -> int:
        """Pages that belong to a sequence; those that are only remembered are as good as free."""
        own = self.runner.answers.used_pages if self.runner.has_answer_pages else 0
        return self.table.used_pages - self.runner.prefix.evictable_pages + own

    def check(self) -> None:
        self.table.check([self.runner.prefix.pages])
        if self.runner.has_answer_pages:
            self.runner.answers.check()

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            if not self.handler.step():
                return
        raise AssertionError("still busy")

    def finish(self) -> None:
        """Run everything, playing the dispatcher: what was prefilled here is decoded here."""
        seen = 0
        self.run()
        while seen < len(self.reporter.events):
            event = self.reporter.events[seen]
            seen += 1
            if isinstance(event, m.PromptPrefilled) and (event.first is None or event.first.finish is None):
                self.handler.handle(self.continuation(event))
            self.run()

    def continuation(self, event: m.PromptPrefilled) -> m.DecodeFrom:
        tokens = self.forced.get(event.request_id, ())
        if event.first is not None:
            tokens = (event.first.token_id,)
        return m.DecodeFrom(
            request_id=event.request_id,
            attempt=event.attempt,
            tokens=tokens,
            sampling=self.sampling[event.request_id],
            next_order=event.next_order,
            next_position=event.next_position,
            lease=event.lease,
            slots=event.slots,
            methods=self.methods.get(event.request_id, Methods()),
        )

    def prefill(
        self,
        name: str,
        token_ids: tuple[int, ...],
        items: tuple[m.PromptItem, ...] = (),
        *,
        sampling: SamplingParams | None = None,
        methods: Methods | None = None,
        forced: tuple[int, ...] = (),
        hand_off: bool = False,
    ) -> m.PrefillPrompt:
        """Hand over a prompt; returns the command."""
        command = m.PrefillPrompt(
            request_id=name,
            attempt=0,
            token_ids=token_ids,
            items=items,
            sampling=sampling or SamplingParams(max_tokens=5, ignore_eos=True),
            methods=methods or Methods(),
            forced=forced,
            hand_off=hand_off,
        )
        self.sampling[name], self.forced[name] = command.sampling, forced
        self.methods[name] = command.methods
        self.handler.handle(command)
        return command

    def part(
        self,
        tokens: int,
        kept: Sequence[int] | None = None,
        *,
        seed: int = 0,
        first: int = 0,
        frame: Sequence[int] | None = None,
        frame_tokens: int = 0,
    ) -> m.EncodedPart:
        """So many published tokens of the item `seed`, from its token `first` on."""
        rows = np.array(range(tokens) if kept is None else kept, np.int32)
        every = np.random.default_rng(seed).standard_normal((first + tokens, WIDTH)).astype(np.float32)
        arrays: dict[str, Array | TypedArray] = {
            "embeddings": every[first + np.clip(rows, 0, tokens - 1)],
            "source": rows,
            "index": first + rows,
            "frame": np.full(len(rows), -1, np.int32) if frame is None else np.array(frame, np.int32),
            "key": np.tile(np.frombuffer(seed.to_bytes(KEY_BYTES, "little"), np.uint8), (len(rows), 1)),
        }
        lease = self.leases.publish(arrays, with_crc=True)
        return m.EncodedPart(lease=lease, tokens=tokens, kept=len(rows), frame_tokens=frame_tokens)

    def item(self, tokens: int, kept: list[int] | None = None, seed: int = 0) -> m.PromptItem:
        """A published media item of so many tokens, equal to every other of this seed."""
        return whole(self.part(tokens, kept, seed=seed))

    def answer(self, name: str) -> list[int]:
        """Generated tokens of a request in order, each once."""
        found = {}
        firsts = [event.first for event in self.reporter.of(m.PromptPrefilled) if event.first is not None]
        decoded = [token for event in self.reporter.of(m.TokensDecoded) for token in event.tokens]
        for token in (*firsts, *decoded):
            if token.request_id == name:
                assert token.seq not in found, "a token came twice"
                found[token.seq] = token.token_id
        return [found[seq] for seq in sorted(found)]
