"""`mmserve bench carriers`: what a decode step and its KV cost after short videos and after long ones.

With `prune carriers` one KV slot stays of every frame, layer and head, so that a step after a long video
should take no longer than after a short one. Knows nothing about how a side works.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

import msgspec

from mmserve.bench.bound import kv_bytes_per_token
from mmserve.bench.engine import TEXT_TOKENS
from mmserve.bench.geometry import build_config, checkpoint, geometry
from mmserve.bench.pairing import Json, Metric, alternate_telling, row
from mmserve.bench.report import Tell, deliver, document
from mmserve.bench.requests import Ask
from mmserve.bench.side import Job, OpenSide, Outcome, RemoteSide, Side, SideConfig
from mmserve.errors import BadRequest
from mmserve.models.layout.llava_onevision import Geometry as Layout
from mmserve.models.loader import decoder_config
from mmserve.request import Methods

CARRIERS = Methods(prune="carriers")
STEPS = 96
STEP_ROWS = 8192  # most prompt rows of a step: they have pages while they are run
SPEED_GATE = 0.9  # a step after the long video takes at most so much longer
SLOTS_GATE = 1.0  # one slot per frame, layer and head
FRAMES_PER_HOUR = 2 * 3600  # at 2 fps


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A short and a long video, in `frames`."""

    geometry: str = "ov-mini"
    frames: tuple[int, int] = (32, 512)
    rounds: int = 5
    threads: int | None = None
    seed: int = 0
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        geometry(self.geometry)
        if not 0 < self.frames[0] < self.frames[1]:
            raise BadRequest(f"Expected frames of a short and of a longer video, but got {self.frames}")


def run(plan: Plan, open_side: OpenSide = RemoteSide, tell: Tell = lambda line: None) -> Json:
    """The whole report; `tell` gets a line whenever something is known."""
    tell(f"checkpoint of {plan.geometry}")
    folder = checkpoint(plan.geometry, plan.seed, plan.cache_dir)
    config = build_config(geometry(plan.geometry))
    text = decoder_config(config.text_config, tied=config.tie_word_embeddings)
    frame_tokens = Layout.from_config(config.to_dict()).frame_tokens
    # what lasts of both videos, twice: in the prefix cache and in use; and the rows of a step
    slots = 2 * (sum(plan.frames) + 2 * (TEXT_TOKENS + STEPS)) + STEP_ROWS + frame_tokens
    side_config = SideConfig(
        checkpoint=str(folder),
        threads=plan.threads,
        kv_memory=slots * kv_bytes_per_token(text, 4),
        methods=CARRIERS,
    )
    with open_side("mmserve", side_config) as side:
        rows = measure(plan, side, tell)
    settings = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "cache_dir"}
    return document("carriers", {**settings, "methods": msgspec.to_builtins(CARRIERS)}, rows)


def measure(plan: Plan, side: Side, tell: Tell) -> list[Json]:
    """The report's rows. Each video is prefilled once: what lasts of it then is in the prefix cache."""
    videos = count(plan.seed * 1_000_000)
    jobs = {
        frames: Job(kind="decode", asks=(Ask(video=next(videos), frames=frames),), tokens=1 + STEPS)
        for frames in plan.frames
    }
    found: dict[int, Outcome] = {}
    for frames, job in jobs.items():
        found[frames] = side.run(job)
        tell(f"{frames} frames: prefilled")
    name = f"decode_{plan.frames[1]}_frames"
    measures = {
        f"{frames} frames": lambda _, job=job: side.run(job).seconds * 1e3 for frames, job in jobs.items()
    }
    times = alternate_telling(name, measures, plan.rounds, tell)
    short, long = (times[f"{frames} frames"] for frames in plan.frames)
    step = Metric(name=name, unit="ms/step", gate=SPEED_GATE)
    return [row(step, long, short, peer_is=f"a step after {plan.frames[0]} frames"), *_memory(plan, found)]


def _memory(plan: Plan, found: dict[int, Outcome]) -> list[Json]:
    """What KV grows by from the short video to the long one."""
    short, long = (found[frames] for frames in plan.frames)
    frames = plan.frames[1] - plan.frames[0]
    slot_bytes = long.kv_bytes_dense / long.prompt_tokens
    per_frame = (long.kv_bytes - short.kv_bytes) / frames
    dense = (long.kv_bytes_dense - short.kv_bytes_dense) / frames
    slots = Metric(name="kv_slots_per_frame", unit="slots", gate=SLOTS_GATE)
    per_hour = Metric(name="kv_per_hour", unit="MiB")
    mib_per_hour = FRAMES_PER_HOUR / 2**20
    return [
        row(slots, [per_frame / slot_bytes], [1.0], peer_is="one per frame, layer and head"),
        row(
            per_hour,
            [per_frame * mib_per_hour],
            [dense * mib_per_hour],
            peer_is="all tokens of an hour at 2 fps",
        ),
    ]


def command(plan: Plan, json_out: Path | None) -> None:
    deliver(lambda tell: run(plan, tell=tell), json_out)


def read_frames(text: str) -> tuple[int, int]:
    """Two numbers with a comma between them; raises BadRequest."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise BadRequest(f"Expected frames as two numbers such as 32,512, but got {text}")
    return int(parts[0]), int(parts[1])
