"""`mmserve bench methods`: mmserve with its methods beside mmserve without, on the same weights.

What a method saves is only worth its accuracy, which `mmserve eval` reports: random weights have none.
Knows nothing about how a side works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import count
from pathlib import Path

import msgspec

from mmserve.bench.bound import kv_bytes_per_token
from mmserve.bench.engine import TEXT_TOKENS
from mmserve.bench.geometry import build_config, checkpoint, geometry
from mmserve.bench.pairing import Json, Measure, Metric, alternate_telling, row
from mmserve.bench.report import Tell, deliver, document
from mmserve.bench.requests import Ask
from mmserve.bench.side import Job, OpenSide, RemoteSide, Side, SideConfig
from mmserve.errors import BadRequest
from mmserve.methods import inner_part, outer_part
from mmserve.models.layout.llava_onevision import Geometry as Layout
from mmserve.models.loader import decoder_config
from mmserve.request import Methods

DECODE_BATCH, DECODE_STEPS = 8, 96
CONCURRENCY = 16
GATED_GEOMETRY, GATED_FRAMES = "ov-mini", 32
GATED = Methods(prune="holitom", keep=0.1)
# the figures of HoliTom's paper (arXiv 2505.21334, section 4)
GATES = {"ttft_cold": 2.28, "ttft_warm": 2.28, "decode_8": 1.32}
THROUGHPUT_GATE = 1.0  # of every method on this geometry: fewer tokens must never serve fewer requests
COST_GATE = 1 / 0.03  # what pruning saves of the first token over what it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`methods` against none. `tokens` are generated per request of a batch."""

    methods: Methods
    geometry: str = GATED_GEOMETRY
    metrics: tuple[str, ...] | None = None  # None takes all
    rounds: int = 5
    frames: int = GATED_FRAMES
    tokens: int = 16
    threads: int | None = None
    seed: int = 0
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        geometry(self.geometry)
        if self.methods == Methods():
            raise BadRequest("Expected a method to measure, such as --prune holitom --keep 0.1, but got none")
        for name in self.metrics or ():
            if name not in METRICS:
                raise BadRequest(f"Expected a metric of {', '.join(METRICS)}, but got {name!r}")

    @property
    def is_gated(self) -> bool:
        sizes = (self.geometry, self.frames)
        return self.methods == GATED and sizes == (GATED_GEOMETRY, GATED_FRAMES)


@dataclass(slots=True, kw_only=True)
class Session:
    plan: Plan
    ours: Side
    dense: Side
    videos: Iterator[int]  # seeds of videos that nobody has seen
    tell: Tell
    rows: list[Json] = field(default_factory=list)

    def asks(self, videos: int = 1) -> tuple[Ask, ...]:
        return tuple(Ask(video=next(self.videos), frames=self.plan.frames) for _ in range(videos))

    def measure(self, name: str, ours: Measure, dense: Measure) -> tuple[list[float], list[float]]:
        sides = {"with": ours, "without": dense}
        found = alternate_telling(name, sides, self.plan.rounds, self.tell)
        return found["with"], found["without"]

    def metric(self, name: str, unit: str, *, more_is_better: bool = False) -> Metric:
        gate = GATES.get(name) if self.plan.is_gated else None
        return Metric(name=name, unit=unit, more_is_better=more_is_better, gate=gate)


def first_token(session: Session) -> None:
    """Cold, then with the embeddings in the cache but none of the KV; then what pruning itself took."""
    plan = session.plan
    asks = [session.asks() for _ in range(plan.rounds)]
    pruned_ms: list[float] = []

    def run(side: Side, prefix: int, number: int) -> float:
        asked = tuple(msgspec.structs.replace(ask, prefix=prefix) for ask in asks[number])
        outcome = side.run(Job(kind="one_by_one", asks=asked, tokens=1))
        if side is session.ours:
            pruned_ms.append(outcome.prune_ms)
        return outcome.seconds * 1e3

    # text before a video shares nothing of its KV, and all of its embeddings
    for name, prefix in (("ttft_cold", 0), ("ttft_warm", 1)):
        measures = (partial(run, side, prefix) for side in (session.ours, session.dense))
        ours, dense = session.measure(name, *measures)
        session.rows.append(row(session.metric(name, "ms"), ours, dense))
    # what an inner method takes is part of prefill: nobody times it apart
    if outer_part(plan.methods).name == "none" or inner_part(plan.methods) is not None:
        return
    saved = [b - a for a, b in zip(ours, dense, strict=True)]
    took = [max(ms, 1e-3) for ms in pruned_ms[-plan.rounds :]]
    cost = Metric(
        name="saved_to_prune", unit="ms", more_is_better=True, gate=COST_GATE if plan.is_gated else None
    )
    session.rows.append(row(cost, saved, took, peer_is="time that reduction itself took, embeddings warm"))


def decode(session: Session) -> None:
    """A step after long prompts; the same prompts in every round, so that they are prefilled once.

    Where their KV is not shared, steps would have other requests' prompts in them: there is no row then.
    """
    if not shares_videos(session.plan.methods):
        session.tell(f"decode_{DECODE_BATCH}: left out, prompts are prefilled anew for every request")
        return
    job = Job(kind="decode", asks=session.asks(DECODE_BATCH), tokens=1 + DECODE_STEPS)
    ours, dense = session.measure(
        f"decode_{DECODE_BATCH}",
        lambda _: session.ours.run(job).seconds * 1e3,
        lambda _: session.dense.run(job).seconds * 1e3,
    )
    session.rows.append(row(session.metric(f"decode_{DECODE_BATCH}", "ms/step"), ours, dense))


def shares_videos(methods: Methods) -> bool:
    """Whether the KV of a video serves a later prompt that begins with it."""
    return inner_part(methods) is None and "memory" not in outer_part(methods).options


def throughput(session: Session) -> None:
    """Different videos, asked about all at once."""
    asks = [session.asks(CONCURRENCY) for _ in range(session.plan.rounds)]

    def rate(side: Side, number: int) -> float:
        job = Job(kind="together", asks=asks[number], tokens=session.plan.tokens)
        return CONCURRENCY / side.run(job).seconds

    name = f"throughput_{CONCURRENCY}"
    ours, dense = session.measure(
        name, lambda number: rate(session.ours, number), lambda number: rate(session.dense, number)
    )
    gate = THROUGHPUT_GATE if session.plan.geometry == GATED_GEOMETRY else None
    metric = Metric(name=name, unit="requests/s", more_is_better=True, gate=gate)
    session.rows.append(row(metric, ours, dense))


METRICS: Mapping[str, Callable[[Session], None]] = {
    "ttft": first_token,
    "decode": decode,
    "throughput": throughput,
}


def run(plan: Plan, open_side: OpenSide = RemoteSide, tell: Tell = lambda line: None) -> Json:
    """The whole report; `tell` gets a line whenever something is known."""
    tell(f"checkpoint of {plan.geometry}")
    folder = checkpoint(plan.geometry, plan.seed, plan.cache_dir)
    config = build_config(geometry(plan.geometry))
    text = decoder_config(config.text_config, tied=config.tie_word_embeddings)
    context = Layout.from_config(config.to_dict()).video_tokens(plan.frames)
    # of a batch in fp32, and as much again for what stays in the prefix cache; both sides have the same
    kv_bytes = 2 * CONCURRENCY * (context + TEXT_TOKENS + DECODE_STEPS) * kv_bytes_per_token(text, 4)
    dense = SideConfig(checkpoint=str(folder), threads=plan.threads, kv_memory=kv_bytes)
    videos = count(plan.seed * 1_000_000)
    with (
        _opened(open_side, msgspec.structs.replace(dense, methods=plan.methods)) as ours,
        _opened(open_side, dense) as base,
    ):
        session = Session(plan=plan, ours=ours, dense=base, videos=videos, tell=tell)
        warm_up = Job(kind="one_by_one", asks=session.asks(), tokens=2)
        for side in (ours, base):
            side.run(warm_up)
        for name in plan.metrics or METRICS:
            METRICS[name](session)
    settings = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "cache_dir"}
    settings["methods"] = msgspec.to_builtins(plan.methods)
    return document("methods", settings, session.rows)


@contextmanager
def _opened(open_side: OpenSide, config: SideConfig) -> Iterator[Side]:
    opened: AbstractContextManager[Side] = open_side("mmserve", config)
    with opened as side:
        yield side


def command(plan: Plan, json_out: Path | None) -> None:
    deliver(lambda tell: run(plan, tell=tell), json_out)
