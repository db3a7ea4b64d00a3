"""`mmserve bench encode`: what it gains that stages overlap, and that encode workers share a video.

Both sides are mmserve itself, a process per stage with one thread each. Times are its own. Knows nothing
about how stages do it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median

from mmserve.bench import media
from mmserve.bench.agreement import FP32_TOLERANCE
from mmserve.bench.deployment import Deployment
from mmserve.bench.geometry import checkpoint, geometry
from mmserve.bench.pairing import Json, Metric, alternate, row
from mmserve.bench.report import Tell, deliver, document
from mmserve.bench.requests import FPS, video
from mmserve.config import Dtype
from mmserve.cores import usable_cores
from mmserve.errors import BadRequest, MMServeError
from mmserve.media.preprocess import Preprocessing
from mmserve.request import CompletionOutput, MediaOptions, Methods, RequestOutput

BALANCED, OVERLAP_FRAMES = "ov-balanced", 128
SHARES = (0.25, 0.45)  # of a stage, where stages are balanced
OVERLAP_GATE = 1 / 0.7  # where they are
BOUND_GATE = 1 / 1.15  # elsewhere: of what the longest stage, or the cores, allow
MINI, WORKERS_FRAMES = "ov-mini", 256
WORKERS_GATE = 1 / 0.65
KEPT = 0.01  # so that next to nothing is prefilled
CHECKED_TOKENS = 16

Stages = Mapping[str, float]
Answer = Callable[[Deployment, int], RequestOutput]  # to a question about a video of this number


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. Where `geometry` or `frames` is None, a part takes what its gate is about.

    `size`, `seconds` and `rate` are of the file that is decoded while other stages work.
    """

    parts: tuple[str, ...] | None = None  # None takes all
    geometry: str | None = None
    frames: int | None = None
    rounds: int = 7
    seed: int = 0
    size: tuple[int, int] = (848, 480)
    seconds: int = 300
    rate: int = 30
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.geometry is not None:
            geometry(self.geometry)
        for name in self.parts or ():
            if name not in PARTS:
                raise BadRequest(f"Expected a part of {', '.join(PARTS)}, but got {name!r}")


def overlap(plan: Plan, tell: Tell) -> list[Json]:
    """The first token of a video while it decodes; and after it was decoded, then encoded."""
    name, frames = plan.geometry or BALANCED, plan.frames or OVERLAP_FRAMES
    folder = checkpoint(name, plan.seed, plan.cache_dir)
    options = MediaOptions(num_frames=frames)
    # of one GOP, so that one process decodes it
    media_plan = media.Plan(size=plan.size, seconds=plan.seconds, rate=plan.rate, cache_dir=plan.cache_dir)
    content = media.video(media_plan, plan.seconds * plan.rate, tell).read_bytes()
    serial: list[Stages] = []

    def ask(side: Deployment, number: int, tokens: int = 1) -> RequestOutput:
        with _numbered(content, number) as path:
            return side.ask({"video": str(path)}, options=options, tokens=tokens)

    with _sides(folder, "float32") as exact:
        _check_tokens(exact, partial(ask, tokens=CHECKED_TOKENS), tell)
    with _sides(folder, "auto") as sides:
        # neither side's first request is timed
        found = {side: stages(ask(deployment, 0)) for side, deployment in sides.items()}["without"]
        tell(f"stages of {name}: {_told(found)}")
        if name == BALANCED:
            check_balance(found)

        def ttft_s(side: str, number: int) -> float:
            output = ask(sides[side], number + 1)
            if side == "without":
                serial.append(stages(output))
            ttft_s = output.timings_ms.ttft / 1e3
            tell(f"overlap {number + 1}/{plan.rounds} {side}: {ttft_s:.4g} s")
            return ttft_s

        taken = alternate({side: partial(ttft_s, side) for side in sides}, plan.rounds)
    return _overlap_rows(name, frames, taken, serial)


def _overlap_rows(
    name: str, frames: int, taken: Mapping[str, Sequence[float]], serial: Sequence[Stages]
) -> list[Json]:
    cores = usable_cores()
    bounds = [max(*each.values(), sum(each.values()) / cores) for each in serial]
    medians = {stage: float(f"{median(each[stage] for each in serial):.4g}") for stage in serial[0]}
    is_balanced = name == BALANCED and frames == OVERLAP_FRAMES
    gained = Metric(name="overlap", unit="s", gate=OVERLAP_GATE if is_balanced else None)
    bound = Metric(name="overlap_bound", unit="s", gate=None if is_balanced else BOUND_GATE)
    settings = {"geometry": name, "frames": frames, "stages_s": medians}
    return [
        row(gained, taken["with"], taken["without"], **settings),
        row(
            bound,
            taken["with"],
            bounds,
            peer_is=f"the longest stage, or all of them by {cores} cores",
            **settings,
        ),
    ]


def workers(plan: Plan, tell: Tell) -> list[Json]:
    """A long video on two encode workers, and on one. Its frames come in memory: nothing is decoded."""
    name, frames = plan.geometry or MINI, plan.frames or WORKERS_FRAMES
    folder = checkpoint(name, plan.seed, plan.cache_dir)
    frame_side = Preprocessing.from_model_dir(folder).video.side
    # this method looks at the whole item, so that prefill waits for the last embedding
    methods = Methods(prune="uniform", keep=KEPT)

    def ask(side: Deployment, number: int, tokens: int = 1) -> RequestOutput:
        made = video(plan.seed * 1_000_000 + number, frames, frame_side)
        return side.ask({"video": made, "fps": FPS}, methods=methods, tokens=tokens)

    with ExitStack() as stack:
        encoders = {"two": 2, "one": 1}
        sides = {
            side: stack.enter_context(Deployment(folder, encoders=count)) for side, count in encoders.items()
        }
        _check_tokens(sides, partial(ask, tokens=CHECKED_TOKENS), tell)

        def encode_s(side: str, number: int) -> float:
            times = ask(sides[side], number + 1).timings_ms
            # from the arrival of the request, its frames at hand, to the last embedding
            encode_s = (times.ttft - times.fetch - times.prefill) / 1e3
            tell(f"workers {number + 1}/{plan.rounds} {side}: {encode_s:.4g} s")
            return encode_s

        taken = alternate({side: partial(encode_s, side) for side in sides}, plan.rounds)
    is_gated = name == MINI and frames == WORKERS_FRAMES
    metric = Metric(name="workers", unit="s", gate=WORKERS_GATE if is_gated else None)
    return [row(metric, taken["two"], taken["one"], geometry=name, frames=frames)]


PARTS: Mapping[str, Callable[[Plan, Tell], list[Json]]] = {"overlap": overlap, "workers": workers}


def run(plan: Plan, tell: Tell = lambda line: None) -> Json:
    """The whole report; `tell` gets a line whenever something is known."""
    rows = [row for name in plan.parts or PARTS for row in PARTS[name](plan, tell)]
    settings = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "cache_dir"}
    return document("encode", settings | {"cores": usable_cores(), "threads": 1}, rows)


def command(plan: Plan, json_out: Path | None) -> None:
    deliver(lambda tell: run(plan, tell=tell), json_out)


def stages(output: RequestOutput) -> Stages:
    """Seconds of each stage of a request whose stages did not overlap."""
    times = output.timings_ms
    decode = times.decode + times.preprocess
    return {"decode": decode / 1e3, "encode": times.encode / 1e3, "prefill": times.prefill / 1e3}


def check_balance(found: Stages) -> None:
    """What overlap gains says little where one stage takes nearly all of the time."""
    least, most = SHARES
    total = sum(found.values())
    if not all(least <= seconds / total <= most for seconds in found.values()):
        raise MMServeError(
            f"Expected each stage of {BALANCED} to take {least:.0%} to {most:.0%} of the time on this "
            f"machine, but got {_told(found)}; nothing was measured"
        )


def _told(found: Stages) -> str:
    total = sum(found.values())
    shares = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in found.items())
    return f"{shares} of {total:.3g} s"


def _check_tokens(sides: Mapping[str, Deployment], answer: Answer, tell: Tell) -> None:
    """Both sides have to answer the same: a gain with other numbers is none."""
    one, other = (answer(deployment, 0).outputs[0] for deployment in sides.values())
    if one.token_ids != other.token_ids:
        raise MMServeError(
            f"Expected the same tokens of both sides, but got {one.token_ids} and {other.token_ids}"
        )
    off = max(abs(a - b) for a, b in zip(_logprobs(one), _logprobs(other), strict=True))
    # a NaN is not below anything
    if not off <= FP32_TOLERANCE:
        raise MMServeError(
            f"Expected log-probabilities within {FP32_TOLERANCE:g}, but they are {off:.3g} off"
        )
    tell(f"{CHECKED_TOKENS} tokens are the same {' and '.join(sides)}, log-probabilities within {off:.2g}")


def _logprobs(answer: CompletionOutput) -> list[float]:
    assert answer.logprobs is not None, "they were asked for"
    return [found[token].logprob for token, found in zip(answer.token_ids, answer.logprobs, strict=True)]


@contextmanager
def _sides(folder: Path, dtype: Dtype) -> Iterator[dict[str, Deployment]]:
    with (
        Deployment(folder, dtype=dtype) as overlapping,
        Deployment(folder, dtype=dtype, overlap=False) as serial,
    ):
        yield {"with": overlapping, "without": serial}


@contextmanager
def _numbered(content: bytes, number: int) -> Iterator[Path]:
    """A file that decodes as this one does, but that nobody has seen: a free box ends it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{number}.mp4"
        path.write_bytes(content + (16).to_bytes(4) + b"free" + number.to_bytes(8))
        yield path
