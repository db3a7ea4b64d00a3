"""`mmserve bench engine`: one engine beside a peer, from the first token to whole batches.

Before anything is timed, both sides must agree in fp32 and nearly agree in the type they are timed in.
Knows nothing about how a side works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path

import msgspec
import torch

from mmserve.bench.agreement import check_exactly, check_nearly
from mmserve.bench.bound import copy_bandwidth, kv_bytes_per_token, step_bytes
from mmserve.bench.geometry import build_config, checkpoint, geometry
from mmserve.bench.pairing import Json, Measure, Metric, alternate_telling, row
from mmserve.bench.report import Tell, deliver, document
from mmserve.bench.requests import QUESTIONS, Ask
from mmserve.bench.side import PEERS, Job, OpenSide, RemoteSide, Side, SideConfig
from mmserve.errors import BadRequest
from mmserve.models.decoder import DecoderConfig
from mmserve.models.layout.llava_onevision import Geometry as Layout
from mmserve.models.loader import decoder_config

BATCH = 16
SHARED_VIDEOS = 4
DECODE_STEPS = 96
CHECKED_FRAMES = 2
TEXT_TOKENS = 64  # more than the template and a question have
# least ratios that pass, and that are aimed at, for this geometry and length on a CPU
GATED_GEOMETRY, GATED_FRAMES = "ov-mini", 32
GATES = {
    "ttft": 1 / 0.8,
    "second": 1 / 0.15,
    "batch_vs_one_by_one": 1.1,
    "batch_vs_padded": 1.0,
    "shared_vs_one_by_one": 6.0,
    "decode_16": 2.0,
    "memory_1": 1.0,
    "memory_16": 1.0,
}
GOALS = {"ttft": 2.0, "decode_1": 2.0, "decode_16": 5.0}
BANDWIDTH_GATES = {"ov-7b": 0.75, "ov-0.5b": 0.4}  # on a GPU, of a step at batch 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. `tokens` are generated per request of a batch; `threads` None takes all cores."""

    geometry: str = GATED_GEOMETRY
    vs: str | None = None
    metrics: tuple[str, ...] | None = None  # None takes all
    rounds: int = 5
    frames: int = GATED_FRAMES
    tokens: int = 16
    peer_sample: int = 4  # requests of a batch that a peer answers one by one; its time is scaled
    threads: int | None = None
    seed: int = 0
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        geometry(self.geometry)
        for name in self.metrics or ():
            if name not in METRICS:
                raise BadRequest(f"Expected a metric of {', '.join(METRICS)}, but got {name!r}")
        if self.vs is not None and self.vs not in PEERS:
            raise BadRequest(f"Expected a peer of {', '.join(PEERS)}, but got {self.vs!r}")


def metric(plan: Plan, name: str, unit: str, *, more_is_better: bool = False) -> Metric:
    """With its gate and goal, where the plan is what they are about."""
    is_gated = (
        plan.geometry == GATED_GEOMETRY and plan.frames == GATED_FRAMES and not torch.cuda.is_available()
    )
    return Metric(
        name=name,
        unit=unit,
        more_is_better=more_is_better,
        gate=GATES.get(name) if is_gated else None,
        goal=GOALS.get(name) if is_gated else None,
    )


@dataclass(slots=True, kw_only=True)
class Session:
    """Two running sides and what they are asked; `peer` is None when only ours is measured."""

    plan: Plan
    text: DecoderConfig
    context: int  # tokens of a video
    ours: Side
    peer: Side | None
    videos: Iterator[int]  # seeds of videos that nobody has seen
    tell: Tell
    rows: list[Json] = field(default_factory=list)

    def ask(self, question: int = 0) -> Ask:
        return Ask(video=next(self.videos), frames=self.plan.frames, question=question)

    def asks(self, videos: int, questions: int) -> tuple[Ask, ...]:
        """Every new video with the first question, then with the next."""
        seeds = [next(self.videos) for _ in range(videos)]
        frames = self.plan.frames
        return tuple(
            Ask(video=seed, frames=frames, question=number) for number in range(questions) for seed in seeds
        )

    def measure(self, name: str, measures: Mapping[str, Measure]) -> dict[str, list[float]]:
        """What every side took in every round."""
        return alternate_telling(name, measures, self.plan.rounds, self.tell)

    def add(
        self,
        name: str,
        unit: str,
        ours: Sequence[float],
        peer: Sequence[float] | None,
        *,
        more_is_better: bool = False,
        **notes: object,
    ) -> None:
        found = metric(self.plan, name, unit, more_is_better=more_is_better)
        self.rows.append(row(found, ours, peer, **notes))

    def both(self, name: str, unit: str, run: Callable[[Side, int], float]) -> None:
        """A row of what both sides do alike."""
        ours, peer = self.ours, self.peer
        measures: dict[str, Measure] = {"ours": lambda number: run(ours, number)}
        if peer is not None:
            measures["peer"] = lambda number: run(peer, number)
        found = self.measure(name, measures)
        self.add(name, unit, found["ours"], found.get("peer"))


def first_token(session: Session) -> None:
    asks = [session.ask() for _ in range(session.plan.rounds)]
    session.both("ttft", "ms", lambda side, number: _first_token_ms(side, asks[number]))


def second_question(session: Session) -> None:
    """The second question on a video; our side has just answered the first one, the peer forgets anyway."""
    asks = [session.ask(question=1) for _ in range(session.plan.rounds)]

    def run(side: Side, number: int) -> float:
        if side is session.ours:
            _first_token_ms(side, msgspec.structs.replace(asks[number], question=0))
        return _first_token_ms(side, asks[number])

    session.both("second", "ms", run)


def batch(session: Session) -> None:
    """Different videos at once, against the peer's one after the other and against its batch."""
    _throughput(session, "batch", [session.asks(BATCH, 1) for _ in range(session.plan.rounds)], padded=True)


def shared(session: Session) -> None:
    """Many questions on few videos at once, against the peer's one after the other."""
    asks = [session.asks(SHARED_VIDEOS, QUESTIONS) for _ in range(session.plan.rounds)]
    _throughput(session, "shared", asks, padded=False)


def _throughput(session: Session, name: str, asks: Sequence[tuple[Ask, ...]], *, padded: bool) -> None:
    ours, peer, plan = session.ours, session.peer, session.plan
    total = len(asks[0])

    def together(side: Side, number: int) -> float:
        job = Job(kind="together", asks=asks[number], tokens=plan.tokens)
        return total / side.run(job).seconds

    if peer is None:
        found = session.measure(name, {"ours": lambda number: together(ours, number)})
        session.add(name, "requests/s", found["ours"], None, more_is_better=True)
        return
    sample = min(plan.peer_sample, total)

    def one_by_one(number: int) -> float:
        job = Job(kind="one_by_one", asks=asks[number][:sample], tokens=plan.tokens)
        return sample / peer.run(job).seconds

    sides: dict[str, Measure] = {"ours": lambda number: together(ours, number), "one_by_one": one_by_one}
    if padded:
        sides["padded"] = lambda number: together(peer, number)
    found = session.measure(name, sides)
    scaled = {"scaled_from": sample} if sample < total else {}
    one = f"{name}_vs_one_by_one"
    session.add(one, "requests/s", found["ours"], found["one_by_one"], more_is_better=True, **scaled)
    if padded:
        two = f"{name}_vs_padded"
        session.add(two, "requests/s", found["ours"], found["padded"], more_is_better=True)


def decode(session: Session) -> None:
    """A step after long prompts; the same prompts in every round, so that they are prefilled once."""
    asks = session.asks(BATCH, 1)
    for size in (1, BATCH):
        job = Job(kind="decode", asks=asks[:size], tokens=1 + DECODE_STEPS)

        def step_ms(side: Side, _: int, job: Job = job) -> float:
            return side.run(job).seconds * 1e3

        session.both(f"decode_{size}", "ms/step", step_ms)
        if size == 1 and torch.cuda.is_available():
            _against_bandwidth(session, session.rows[-1]["samples"]["ours"])


def _against_bandwidth(session: Session, steps_ms: Sequence[float]) -> None:
    """How near steps at batch 1 come to what the GPU's memory allows; the peer is the memory itself."""
    read = step_bytes(session.text, 1, session.context, element_bytes=2)
    bound = Metric(
        name="decode_1_vs_bandwidth",
        unit="GB/s",
        more_is_better=True,
        gate=BANDWIDTH_GATES.get(session.plan.geometry),
    )
    bandwidth = copy_bandwidth() / 1e9
    rates = [read / step_ms / 1e6 for step_ms in steps_ms]
    session.rows.append(row(bound, rates, [bandwidth] * len(rates), peer_is="measured copy bandwidth"))


def memory(plan: Plan, opened: Callable[[], AbstractContextManager[Session]]) -> list[Json]:
    """Peaks of processes that have done nothing else: after one request, then after a batch."""
    ours: dict[int, list[float]] = {1: [], BATCH: []}
    peer: dict[int, list[float]] = {1: [], BATCH: []}
    for number in range(plan.rounds):
        with opened() as both:
            for size in ours:
                job = Job(kind="together", asks=both.asks(size, 1), tokens=plan.tokens)
                for side, found in ((both.ours, ours), (both.peer, peer)):
                    if side is not None:
                        side.run(job)
                        found[size].append(side.peak_bytes() / 2**20)
                peaks = " and ".join(f"{found[size][-1]:.4g}" for found in (ours, peer) if found[size])
                both.tell(f"memory_{size} {number + 1}/{plan.rounds}: {peaks} MiB")
    return [row(metric(plan, f"memory_{size}", "MiB"), ours[size], peer[size] or None) for size in ours]


TIMED: Mapping[str, Callable[[Session], None]] = {
    "ttft": first_token,
    "second": second_question,
    "batch": batch,
    "shared": shared,
    "decode": decode,
}
METRICS = (*TIMED, "memory")


def run(plan: Plan, open_side: OpenSide = RemoteSide, tell: Tell = lambda line: None) -> Json:
    """The whole report; `tell` gets a line whenever something is known."""
    tell(f"checkpoint of {plan.geometry}")
    folder = checkpoint(plan.geometry, plan.seed, plan.cache_dir)
    config = build_config(geometry(plan.geometry))
    text = decoder_config(config.text_config, tied=config.tie_word_embeddings)
    context = Layout.from_config(config.to_dict()).video_tokens(plan.frames)
    # of a batch in fp32, and as much again for what stays in the prefix cache
    kv_bytes = 2 * BATCH * (context + TEXT_TOKENS + DECODE_STEPS) * kv_bytes_per_token(text, 4)
    fast = SideConfig(checkpoint=str(folder), threads=plan.threads, kv_memory=kv_bytes)
    videos = count(plan.seed * 1_000_000)

    @contextmanager
    def session(config: SideConfig) -> Iterator[Session]:
        with ExitStack() as stack:
            ours = stack.enter_context(open_side("mmserve", config))
            peer = stack.enter_context(open_side(plan.vs, config)) if plan.vs else None
            yield Session(
                plan=plan, text=text, context=context, ours=ours, peer=peer, videos=videos, tell=tell
            )

    checks: list[Json] = []
    rows: list[Json] = []
    if plan.vs is not None:
        with session(msgspec.structs.replace(fast, dtype="float32")) as exact:
            assert exact.peer is not None
            ask = Ask(video=next(videos), frames=CHECKED_FRAMES)
            checks.append(check_exactly(exact.ours, exact.peer, ask))
            tell(_told(checks[-1]))
    names = plan.metrics or METRICS
    timed = [name for name in names if name in TIMED]
    if timed:
        with session(fast) as both:
            checks += _warm_up(both)
            for name in timed:
                TIMED[name](both)
            rows += both.rows
    if "memory" in names:
        # pages as users have them, who do not size them for a benchmark
        rows += memory(plan, lambda: session(msgspec.structs.replace(fast, kv_memory=None)))
    settings = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "cache_dir"}
    return document("engine", settings, rows) | {"checks": checks}


def command(plan: Plan, json_out: Path | None) -> None:
    deliver(lambda tell: run(plan, tell=tell), json_out)


def _warm_up(session: Session) -> list[Json]:
    """One request of full size on either side, which also shows whether the numbers nearly agree."""
    job = Job(kind="score", asks=(session.ask(),), tokens=2)
    ours = session.ours.run(job)
    if session.peer is None:
        return []
    check = check_nearly(ours, session.peer.run(job))
    session.tell(_told(check))
    return [check]


def _told(check: Json) -> str:
    return f"{check['what']}: within {check['max_abs_difference']:.2g} of the peer's"


def _first_token_ms(side: Side, ask: Ask) -> float:
    return side.run(Job(kind="one_by_one", asks=(ask,), tokens=1)).seconds * 1e3
