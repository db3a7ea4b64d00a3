"""ClipWorld: seeded short clips and images with questions whose answers are known exactly.

A `Scene` is a plain description (who is visible where and when); `render` makes its pixels and
`questions` everything that can be asked about it. The held-out suites built from them are in
`suites.py`. Knows nothing about models.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from mmserve.evaluation.drawing import COLOURS, SHAPES, background, draw_sprite

SIDE = 144  # pixels of a square frame
FPS = 4
CRF = 18  # of the suites' H.264 files
KINDS = ("colour", "shape", "count", "direction", "digit", "order", "cuts", "yesno")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {shape}?",
        "What color is the {shape}?",
        "Which colour does the {shape} have?",
    ),
    "shape": (
        "What shape is the {colour} object?",
        "Which shape is {colour}?",
        "What is the {colour} object?",
    ),
    "count": ("How many objects are there?", "How many objects does the clip show?", "Count the objects."),
    "direction": (
        "Which way does the {shape} move?",
        "In which direction does the {shape} move?",
        "Where is the {shape} moving?",
    ),
    "digit": ("Which digit is shown?", "What digit appears?", "Which number is shown briefly?"),
    "order": (
        "Which flashes first, the {a} or the {b}?",
        "Which appears first, the {a} or the {b}?",
        "What comes first, the {a} or the {b}?",
    ),
    "cuts": (
        "How many scene cuts are there?",
        "How many times does the scene change?",
        "Count the scene cuts.",
    ),
    "yesno": (
        "Is there {colour} {shape}?",
        "Does the clip show {colour} {shape}?",
        "Do you see {colour} {shape}?",
    ),
}

Clip = NDArray[np.uint8]  # [T, H, W, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """One sprite: where its top-left corner is at frame 0 of the clip, and in which frames it shows.

    `look` is a shape or a digit "0" to "9"; `x, y, size` are pixels, `vx, vy` pixels per frame;
    it is visible for `start <= frame < stop`. A `flash` is there for a moment only.
    """

    look: str
    colour: str
    size: int
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0
    start: int = 0
    stop: int
    flash: bool = False

    def at(self, frame: int) -> tuple[float, float] | None:
        if not self.start <= frame < self.stop:
            return None
        return self.x + self.vx * frame, self.y + self.vy * frame

    @property
    def direction(self) -> str | None:
        """Name of the axis-aligned direction of motion, or None when the actor rests."""
        for name, (dx, dy) in DIRECTIONS.items():
            if self.vx * dx + self.vy * dy > 0:
                return name
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A whole clip as data: actors, cut frames, camera and noise."""

    frames: int
    actors: tuple[Actor, ...]
    cuts: tuple[int, ...] = ()
    pan: tuple[float, float] = (0.0, 0.0)  # background drift, pixels per frame
    shake: int = 0  # camera shake, pixels
    noise: float = 0.0  # sensor noise, standard deviation in grey levels
    seed: int = 0  # of background, shake and noise


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    text: str
    answer: str


def render(scene: Scene) -> Clip:
    """Pixels of a scene, uint8 [T, 144, 144, 3]; the same scene always gives the same bytes."""
    rng = np.random.default_rng(scene.seed)
    bounds = (0, *scene.cuts, scene.frames)
    clip = np.empty((scene.frames, SIDE, SIDE, 3), np.uint8)
    reach = np.arange(SIDE)
    for first, last in pairwise(bounds):
        picture = background(rng)
        origin = rng.integers(0, len(picture), 2)
        for frame in range(first, last):
            jitter = rng.integers(-scene.shake, scene.shake + 1, 2)
            rows = (reach + origin[1] + round(scene.pan[1] * frame) + jitter[1]) % len(picture)
            columns = (reach + origin[0] + round(scene.pan[0] * frame) + jitter[0]) % len(picture)
            canvas = picture[rows][:, columns]
            for actor in scene.actors:
                place = actor.at(frame)
                if place is not None:
                    x, y = place[0] - jitter[0], place[1] - jitter[1]
                    draw_sprite(canvas, actor.look, actor.colour, actor.size, x, y)
            if scene.noise:
                canvas = canvas + rng.standard_normal(canvas.shape, np.float32) * np.float32(scene.noise)
            clip[frame] = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return clip


def write_mp4(clip: Clip, target: Path | io.BytesIO, fps: float = FPS, crf: int = CRF) -> None:
    """Encode a clip as H.264 in an mp4 container (or into a buffer)."""
    output = str(target) if isinstance(target, Path) else target
    with av.open(output, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        # x264's macroblock tree reads memory it has not written: the same pixels would give other bytes
        stream.options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        for array in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def through_codec(clip: Clip, crf: int = CRF) -> Clip:
    """The clip as it looks after H.264: what the model sees of a file."""
    buffer = io.BytesIO()
    write_mp4(clip, buffer, crf=crf)
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.uint8, copy=False)


class _Board:
    """Free places of a frame, divided into lanes along the axis of motion; nothing ever overlaps."""

    def __init__(self, rng: np.random.Generator, lanes: int) -> None:
        self.rng = rng
        self.lanes = lanes
        self.cell = SIDE // lanes
        self.horizontal = bool(rng.random() < 0.5)
        self.free = {lane: list(rng.permutation(lanes)) for lane in rng.permutation(lanes).tolist()}
        self.looks = iter(rng.permutation(SHAPES).tolist())
        self.colours = iter(rng.permutation(list(COLOURS)).tolist())

    @property
    def free_cells(self) -> int:
        return sum(map(len, self.free.values()))

    def _size(self) -> int:
        return int(self.rng.integers(48, min(self.cell, 64) + 1))

    def _turned(self, along: float, across: float) -> tuple[float, float]:
        return (along, across) if self.horizontal else (across, along)

    def mover(self, frames: int) -> Actor:
        """An actor that crosses a lane of its own; both directions visit every place equally often."""
        lane = next(lane for lane, cells in self.free.items() if len(cells) == self.lanes)
        self.free[lane] = []
        size = self._size()
        travel = self.rng.uniform(44, SIDE - size)
        begin = self.rng.uniform(0, SIDE - size - travel)
        sign = 1 if self.rng.random() < 0.5 else -1
        x, y = self._turned(begin if sign > 0 else begin + travel, lane * self.cell + (self.cell - size) / 2)
        vx, vy = self._turned(sign * travel / max(frames - 1, 1), 0.0)
        return Actor(
            look=next(self.looks), colour=next(self.colours), size=size, x=x, y=y, vx=vx, vy=vy, stop=frames
        )

    def rest(self, start: int, stop: int, *, digit: str | None = None, flash: bool = False) -> Actor:
        """A resting actor (or a digit plate) in a free cell."""
        lanes = [lane for lane, cells in self.free.items() if cells]
        lane = int(self.rng.choice(lanes))
        size = self._size()
        slack = self.cell - size
        along = self.free[lane].pop() * self.cell + self.rng.uniform(0, slack)
        x, y = self._turned(float(along), lane * self.cell + float(self.rng.uniform(0, slack)))
        look, colour = (digit, "white") if digit is not None else (next(self.looks), next(self.colours))
        return Actor(look=look, colour=colour, size=size, x=x, y=y, start=start, stop=stop, flash=flash)


def _moments(rng: np.random.Generator, frames: int, count: int, longest: int) -> list[tuple[int, int]]:
    """`count` disjoint intervals of 1 to `longest` frames, in order of time."""
    edges = np.sort(rng.choice(frames // longest, size=count, replace=False)) * longest
    spans = [(int(edge), int(rng.integers(1, longest + 1))) for edge in edges]
    return [(edge + int(rng.integers(0, longest - span + 1)), span) for edge, span in spans]


def sample_scene(rng: np.random.Generator, topic: str, frames: int = 8, flash_frames: int = 2) -> Scene:
    """A random scene about which a question of kind `topic` can be asked.

    `flash_frames` bounds how long digits and flashing shapes are visible.
    """
    count = int(rng.integers(1, 6)) if topic == "count" else int(rng.integers(2, 4))
    busy = topic in ("order", "digit", "count", "cuts")
    board = _Board(rng, 3 if busy else int(rng.integers(2, 4)))
    cuts: tuple[int, ...] = ()
    may_cut = topic in ("colour", "shape", "digit", "yesno") and rng.random() < 0.15
    if frames >= 5 and (topic == "cuts" or may_cut):
        cuts = tuple(start for start, _ in _moments(rng, frames - 1, int(rng.integers(0, 3)), 2))
        cuts = tuple(cut + 1 for cut in cuts)
    bounds = (0, *cuts, frames)
    wish = int(rng.integers(0, 2)) if topic in ("order", "count", "cuts") else int(rng.choice([0, 1, 1, 2]))
    movers = 0 if cuts or frames == 1 else max(wish, topic == "direction")
    movers = min(movers, count, board.lanes - 1)
    actors = [board.mover(frames) for _ in range(movers)]
    if topic == "order" or (
        topic not in ("count", "cuts") and frames > 1 and rng.random() < 0.1 and board.lanes == 3
    ):
        for start, span in _moments(rng, frames, 2, min(flash_frames, frames // 2)):
            actors.append(board.rest(start, start + span, flash=True))
    if topic == "digit" or (
        topic not in ("count",) and frames > 1 and rng.random() < 0.1 and board.free_cells > 2
    ):
        start, span = _moments(rng, frames, 1, min(flash_frames, frames))[0]
        actors.append(board.rest(start, start + span, digit=str(rng.integers(10)), flash=True))
    for index in range(min(count - movers, board.free_cells)):
        scene = index % (len(bounds) - 1)
        actors.append(board.rest(bounds[scene], bounds[scene + 1]))
    drift = rng.uniform(-3, 3, 2) if rng.random() < 0.4 else (0.0, 0.0)
    return Scene(
        frames=frames,
        actors=tuple(actors),
        cuts=cuts,
        pan=(float(drift[0]), float(drift[1])),
        shake=int(rng.choice([0, 0, 1, 2])),
        noise=float(rng.choice([0.0, 3.0, 6.0])),
        seed=int(rng.integers(2**62)),
    )


def _ask(rng: np.random.Generator, kind: str, answer: str, **words: str) -> Question:
    return Question(kind, str(rng.choice(TEMPLATES[kind])).format(**words), answer)


def questions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Everything this scene can be asked, in random wording."""
    shapes = [actor for actor in scene.actors if actor.look in SHAPES]
    digits = [actor for actor in scene.actors if actor.look not in SHAPES]
    steady = [actor for actor in shapes if not actor.flash]
    flashes = sorted((actor for actor in shapes if actor.flash), key=lambda actor: actor.start)
    asked = [_ask(rng, "colour", actor.colour, shape=actor.look) for actor in shapes]
    asked += [_ask(rng, "shape", actor.look, colour=actor.colour) for actor in shapes]
    asked += [
        _ask(rng, "direction", actor.direction, shape=actor.look)
        for actor in steady
        if actor.direction is not None
    ]
    asked += [_ask(rng, "digit", actor.look) for actor in digits if len(digits) == 1]
    if not digits and not flashes and not scene.cuts:
        asked.append(_ask(rng, "count", str(len(steady))))
    if len(flashes) == 2:
        a, b = rng.permutation([actor.look for actor in flashes]).tolist()
        asked.append(_ask(rng, "order", flashes[0].look, a=a, b=b))
    if scene.frames > 1:
        asked.append(_ask(rng, "cuts", str(len(scene.cuts))))
    return asked + _yes_and_no(rng, shapes)


def _yes_and_no(rng: np.random.Generator, shapes: list[Actor]) -> list[Question]:
    """One true and one false statement; the false one swaps attributes of two objects where it can."""
    if not shapes:
        return []
    true = shapes[int(rng.integers(len(shapes)))]
    others = [actor.colour for actor in shapes if actor is not true] or [
        c for c in COLOURS if c != true.colour
    ]
    false = str(rng.choice(others))
    return [
        _ask(rng, "yesno", "yes", colour=_article(true.colour), shape=true.look),
        _ask(rng, "yesno", "no", colour=_article(false), shape=true.look),
    ]


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def ask_about(rng: np.random.Generator, scene: Scene, topic: str) -> Question:
    """One question of kind `topic`, chosen evenly among those the scene allows."""
    matching = [question for question in questions(rng, scene) if question.kind == topic]
    return matching[int(rng.integers(len(matching)))]


def visible(scene: Scene, frame: int) -> list[tuple[Actor, float, float]]:
    """Ground truth of one frame: each visible actor with the centre of its sprite in pixels."""
    places = [(actor, actor.at(frame)) for actor in scene.actors]
    return [(actor, p[0] + actor.size / 2, p[1] + actor.size / 2) for actor, p in places if p is not None]
