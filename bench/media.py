"""`mmserve bench media`: how long it takes to get n frames of a video, beside the usual ways to do it.

Every side gives RGB frames of full size. Ours go through the sandbox, as in the server. All of it runs
on one core, where nothing hides work. Knows nothing about models.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

from mmserve.bench.geometry import default_cache_dir
from mmserve.bench.pairing import Json, Measure, Metric, alternate, row
from mmserve.bench.report import Tell, deliver, document
from mmserve.errors import BadRequest, MMServeError
from mmserve.media.limits import MediaLimits
from mmserve.media.pool import SandboxPool
from mmserve.request import MediaOptions, MediaRef

Frames = Sequence[npt.NDArray[np.uint8]]
Read = Callable[[Path, int], Frames]  # a video and how many frames of it

LIBRARIES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}
GATE = 1 / 1.15  # of the quickest peer's speed
LAYOUT = 1  # of the generated videos
TOLERANCE = 2.0  # libraries differ in how they interpolate chroma


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure: every combination of `gops` and `frames`, for each backend of ours."""

    rounds: int = 7
    backends: tuple[str, ...] | None = None  # None takes all that are installed
    gops: tuple[int, ...] = (30, 250)
    frames: tuple[int, ...] = (32, 120)
    size: tuple[int, int] = (1280, 720)
    seconds: int = 60
    rate: int = 30
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in self.backends or ():
            if name not in LIBRARIES or not is_installed(name):
                known = ", ".join(filter(is_installed, LIBRARIES))
                raise BadRequest(f"Expected a backend of {known}, but got {name!r}")


def is_installed(backend: str) -> bool:
    return find_spec(LIBRARIES[backend]) is not None


def sequential(path: Path, count: int) -> Frames:
    """PyAV from the first frame to the last wanted one."""
    with av.open(str(path)) as container:
        wanted = _wanted(container.streams.video[0], count)
        picked, last = set(wanted), wanted[-1]
        frames = []
        for number, frame in enumerate(container.decode(video=0)):
            if number in picked:
                frames.append(_rgb(frame))
            if number == last:
                break
    return frames


def seek_each(path: Path, count: int) -> Frames:
    """PyAV with a seek for every frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        assert stream.time_base is not None
        ticks = 1 / (stream.average_rate * stream.time_base)
        frames = []
        for number in _wanted(stream, count):
            pts = int(number * ticks) + (stream.start_time or 0)
            container.seek(pts, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts is None or frame.pts >= pts)
            frames.append(_rgb(frame))
    return frames


def transformers(backend: str) -> Read:
    """transformers' own loading."""
    from transformers.video_utils import load_video

    def read(path: Path, count: int) -> Frames:
        video, _ = load_video(str(path), num_frames=count, backend=backend)
        return [np.asarray(frame) for frame in video]

    return read


@contextmanager
def sandboxed(backend: str) -> Iterator[Read]:
    """Ours: one process, which is running already, as in a server."""
    with tempfile.TemporaryDirectory(dir=_memory_directory()) as directory:
        limits, numbers = MediaLimits(video_backend=backend), itertools.count()
        with closing(SandboxPool(directory, limits, processes=1)) as pool:

            def read(path: Path, count: int) -> Frames:
                link = Path(directory) / f"{next(numbers)}.mp4"
                link.symlink_to(path)  # under a new name the file is opened again, as by the others
                ref = MediaRef(
                    modality="video",
                    path=str(link),
                    digest="",
                    source=path.name,
                    options=MediaOptions(num_frames=count),
                )
                plan = pool.plan(ref)
                return [frame for segment in pool.segments(ref, plan) for frame in segment.frames]

            yield read


def run(plan: Plan, tell: Tell = lambda line: None) -> Json:
    """The whole report; `tell` gets a line whenever something is known."""
    backends = plan.backends or tuple(filter(is_installed, LIBRARIES))
    videos = {gop: video(plan, gop, tell) for gop in plan.gops}
    rows: list[Json] = []
    with one_core() as core:
        for gop, path in videos.items():
            for frames in plan.frames:
                taken = _measure_cell(plan, path, frames, backends, tell)
                rows += [_row(f"gop{gop}_frames{frames}_{name}", name, taken, backends) for name in backends]
    settings = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "cache_dir"}
    return document("media", settings | {"backends": backends, "core": core, "cores": 1}, rows)


def command(plan: Plan, json_out: Path | None) -> None:
    deliver(lambda tell: run(plan, tell=tell), json_out)


def _measure_cell(
    plan: Plan, path: Path, count: int, backends: Sequence[str], tell: Tell
) -> dict[str, list[float]]:
    """Seconds of every side in every round; first, all of them must show the same frames."""
    peers: dict[str, Read] = {"seek_each": seek_each, "sequential": sequential}
    peers |= {f"transformers_{name}": transformers(name) for name in backends}
    truth = sequential(path, count)

    def measured(name: str, read: Read) -> Measure:
        difference = _difference(read(path, count), truth)
        if difference > TOLERANCE:
            raise MMServeError(f"Expected {name} to show the same frames, but they are {difference:.1f} off")

        def measure(number: int) -> float:
            began = time.perf_counter()
            read(path, count)
            found = time.perf_counter() - began
            tell(f"{path.stem}, {count} frames, {number + 1}/{plan.rounds} {name}: {found:.3f} s")
            return found

        return measure

    with ExitStack() as stack:
        ours = {name: stack.enter_context(sandboxed(name)) for name in backends}
        sides = {name: measured(name, read) for name, read in {**ours, **peers}.items()}
        return alternate(sides, plan.rounds)


def _row(name: str, backend: str, taken: Mapping[str, list[float]], backends: Sequence[str]) -> Json:
    """One backend of ours against the quickest of the others; the rest is told by name."""
    peers = {side: median(times) for side, times in taken.items() if side not in backends}
    best = min(peers, key=lambda side: peers[side])
    metric = Metric(name=name, unit="s", gate=GATE)
    medians = {side: float(f"{seconds:.4g}") for side, seconds in peers.items()}
    return row(metric, taken[backend], taken[best], peer_is=best, peers=medians)


def _difference(ours: Frames, truth: Frames) -> float:
    """The largest mean difference of a frame."""
    pairs = zip(ours, truth, strict=True)
    return max(float(np.abs(one.astype(np.int16) - other).mean()) for one, other in pairs)


def _rgb(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def _wanted(stream: VideoStream, count: int) -> list[int]:
    """As transformers spreads frames."""
    return [index * stream.frames // count for index in range(count)]


@contextmanager
def one_core() -> Iterator[int]:
    """Keep this process, and those that it starts, on one of its cores."""
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def video(plan: Plan, gop: int, tell: Tell) -> Path:
    """A generated H.264 file with B-frames; made when it is not in the cache yet."""
    width, height = plan.size
    name = f"media-{width}x{height}-{plan.seconds}s-{plan.rate}fps-gop{gop}-{LAYOUT}.mp4"
    path = (plan.cache_dir or default_cache_dir()) / name
    if not path.is_file():
        tell(f"video {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        try:
            _write(unfinished, plan, gop)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _write(path: Path, plan: Plan, gop: int) -> None:
    """A textured picture that the camera pans over, and a square that moves against it."""
    width, height = plan.size
    texture = np.random.default_rng(0).integers(40, 216, (height // 8 + 1, width // 4 + 1, 3))
    background = np.kron(texture, np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=plan.rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {
            **{"preset": "veryfast", "crf": "23", "bf": "3", "sc_threshold": "0"},
            **{"g": str(gop), "keyint_min": str(gop)},
        }
        for number in range(plan.seconds * plan.rate):
            left = number * 2 % width
            pixels = background[:height, left : left + width].copy()
            top = number * 3 % (height // 2)
            pixels[top : top + height // 4, width // 3 : width // 3 + height // 4] = number % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _memory_directory() -> str | None:
    """Where a server passes frames, too."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
