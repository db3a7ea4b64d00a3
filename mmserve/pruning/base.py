"""The contract of a visual-token reducer and the registry of reducers by name.

Knows nothing about models or prompts. Imports no torch, so that names and settings can be checked in
processes that hold no model; a method's own module is imported when it is first asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

from mmserve.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

Modality = Literal["image", "video"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VisualItem:
    """One media item as the projector left it: `T` frames (an image is one) of `N` tokens each.

    `saliency` is the attention each token received in the vision tower, larger is more important.
    `protect` marks tokens that always survive and never count, such as row newlines; every frame
    has the same marks. `grids` are rows and columns of the pictures that the other tokens of a frame
    show one after the other, row by row; where they are not known, a method may guess.
    """

    embeddings: Tensor  # [T, N, D]
    saliency: Tensor  # [T, N]
    protect: Tensor | None = None  # bool [T, N]
    modality: Modality = "video"
    grids: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        grid = self.embeddings.shape[:2]
        assert self.embeddings.ndim == 3, f"Expected [T, N, D], got {self.embeddings.shape}"
        assert grid.numel() > 0, f"Expected at least one token, got {self.embeddings.shape}"
        assert self.saliency.shape == grid, f"Expected saliency {grid}, got {self.saliency.shape}"
        assert self.protect is None or self.protect.shape == grid, "Expected protect shaped as saliency"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduced:
    """What survives of one item, in the order of the original layout.

    `source` is `t * N + n` of the position a token stands at (its cluster's centre, its run's first
    frame), strictly ascending; `weight` is how many original tokens were merged into it.
    """

    embeddings: Tensor  # [m, D]
    source: Tensor  # int64 [m]
    weight: Tensor  # float32 [m]


class Pruner(Protocol):
    """One reduction method with its settings: deterministic, so its result may be cached by content.

    Two items reduced apart or one after the other give the same bits.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    name: ClassVar[str]
    paper: ClassVar[str]
    needs_query: ClassVar[bool]
    needs_whole_item: ClassVar[bool]  # or a whole window, where the method has `window_frames`
    count: ClassVar[Literal["exact", "bound"]]
    trained_weights: ClassVar[bool]
    modalities: ClassVar[tuple[Modality, ...]]

    @property
    def acts_at(self) -> Literal["encoder", "prefill"]: ...

    @property
    def keep(self) -> float: ...

    def plan(self, frames: int, tokens: int) -> int:
        """How many of `frames` x `tokens` unprotected tokens `reduce` will return, known beforehand."""
        ...

    def reduce(self, item: VisualItem) -> Reduced: ...


PRUNERS: dict[str, str] = {
    "none": "mmserve.pruning.none:NoPruning",
    "random": "mmserve.pruning.random:RandomPruning",
    "uniform": "mmserve.pruning.uniform:UniformPruning",
    "holitom": "mmserve.pruning.holitom:HoliTom",
    "carriers": "mmserve.pruning.carriers:SemanticCarriers",
    "visionzip": "mmserve.pruning.visionzip:VisionZip",
    "prumerge": "mmserve.pruning.prumerge:PruMerge",
    "dycoke": "mmserve.pruning.dycoke:DyCoke",
    "prunevid": "mmserve.pruning.prunevid:PruneVid",
    "framefusion": "mmserve.pruning.framefusion:FrameFusion",
    "fastvid": "mmserve.pruning.fastvid:FastVID",
    "flashvid": "mmserve.pruning.flashvid:FlashVID",
    "divprune": "mmserve.pruning.divprune:DivPrune",
    "scissor": "mmserve.pruning.scissor:Scissor",
    "sttm": "mmserve.pruning.sttm:STTM",
    "tome": "mmserve.pruning.tome:ToMe",
    "evs": "mmserve.pruning.evs:EVS",
    "vidcom2": "mmserve.pruning.vidcom2:VidCom2",
    "timechat": "mmserve.pruning.timechat:TimeChat",
}


def load_pruner(name: str) -> type[Pruner]:
    """The class behind a registered name: a dataclass whose fields are its settings."""
    if name not in PRUNERS:
        raise BadRequest(f"Expected prune to be one of {', '.join(PRUNERS)}, but got {name!r}")
    module, _, attribute = PRUNERS[name].partition(":")
    return cast("type[Pruner]", getattr(import_module(module), attribute))


def make_pruner(name: str, keep: float, **settings: object) -> Pruner:
    """Build a method that keeps the share `keep` of the tokens; wrong names or values raise BadRequest."""
    method = load_pruner(name)
    check_settings(name, method, settings)
    build = cast("Callable[..., Pruner]", method)
    return build(keep=keep, **settings)


def check_settings(name: str, method: type[Any], settings: Iterable[str]) -> None:
    """Raise BadRequest unless a method has them all."""
    known = [field.name for field in dataclasses.fields(method) if field.name != "keep"]
    for setting in settings:
        if setting not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise BadRequest(f"Expected settings of {name} to be {expected}, but got {setting[:40]!r}")


def check_range(setting: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise BadRequest unless `value` is a number from `low` (excluded if `low_open`) to `high`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= cast("float", value) <= high and not (low_open and value == low):
        return
    bounds = f"above {low:g}" if low_open else f"from {low:g}"
    raise BadRequest(f"Expected {setting} {bounds} to {high:g}, but got {value!r}")


def check_count(setting: str, value: object, low: int, high: int) -> None:
    """Raise BadRequest unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    raise BadRequest(f"Expected {setting} to be a whole number from {low} to {high}, but got {value!r}")


def check_flag(setting: str, value: object) -> None:
    """Raise BadRequest unless `value` is true or false."""
    if not isinstance(value, bool):
        raise BadRequest(f"Expected {setting} to be true or false, but got {value!r}")


def check_keep(keep: object) -> None:
    check_range("keep", keep, 0, 1, low_open=True)


def exact_count(keep: float, total: int) -> int:
    """max(1, floor(keep * total)) of the decimal that was written: 0.29 of 100 is 29, never 28."""
    return min(total, max(1, floor_share(keep, total)))


def floor_share(share: float, total: int) -> int:
    """floor(share * total) of the decimal that was written."""
    return math.floor(Fraction(repr(float(share))) * total)


def window_frames(pruner: Pruner) -> int:
    """How many frames a method must see together; 0 is the whole item."""
    if not pruner.needs_whole_item:
        return 1
    return int(getattr(pruner, "window_frames", 0))


def windows(frames: int, window_frames: int) -> Iterator[tuple[int, int]]:
    """Frame ranges [start, stop) that are reduced independently; `window_frames` 0 is the whole item."""
    step = window_frames or frames
    for start in range(0, frames, step):
        yield start, min(start + step, frames)


def count_by_window(keep: float, frames: int, tokens: int, window_frames: int, *, least: int = 1) -> int:
    """How many of `frames` x `tokens` survive where each window keeps its exact count, or `least` tokens."""
    spans = windows(frames, window_frames)
    return sum(max(least, exact_count(keep, (stop - start) * tokens)) for start, stop in spans)
