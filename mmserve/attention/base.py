"""The contract of a sparse attention pattern and the registry of patterns by name.

A pattern says which keys each row of a prompt sees; kernels do the rest. Knows nothing about pages, chunks'
rules or requests. Imports no torch before a pattern is asked for.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, cast, runtime_checkable

from mmserve.errors import BadRequest
from mmserve.pruning.base import check_count, check_settings
from mmserve.pruning.settings import check_values

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mmserve.kernels.prefill_attention import AttentionIndex

# what a pattern kept of earlier chunks and layers of the same prompt, by layer: its own business. It may be
# empty at any chunk: what came before may have been dense, or another prompt's
PatternMemory = dict[int, object]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkView:
    """Some rows of one prompt in one layer that are about to attend.

    Slots are the prompt's rows so far, in order, alike in all heads; row r is slot rows[r] and sees the slots
    up to itself. Slots hold whatever the layer has: with token reduction some of the prompt's are missing.
    `keys` and `values` may be views of pages: nobody writes to them. Tensors are on one device, arrays on
    the host.
    """

    layer: int
    layers: int  # of the model
    queries: Tensor  # [n, Hq, d], rotated
    keys: Tensor  # [S, Hkv, d], rotated
    values: Tensor  # [S, Hkv, d]
    rows: NDArray[np.int32]  # [n] slots, ascending; the last slots may be missing
    is_visual: NDArray[np.bool_]  # [S]
    item: NDArray[np.int32]  # [S] which image or video; -1 text
    frame: NDArray[np.int32]  # [S] which frame of the whole prompt, counted over all items; -1 text
    tile_rows: int  # most rows of a tile
    memory: PatternMemory | None = None  # None: nothing is kept

    @property
    def scale(self) -> float:
        return float(self.queries.shape[2] ** -0.5)


@dataclass(frozen=True, slots=True)
class Skipping:
    """An index whose blocks of keys are left out where no weight exceeds `threshold` of its row's largest.

    The oracle, which serves fp32 on a CPU, leaves out nothing.
    """

    index: AttentionIndex
    threshold: float


class AttentionPattern(ABC):
    """One sparse pattern: a frozen dataclass, one per file, its fields are its settings.

    It is deterministic, and what a prompt sees depends on nothing but that prompt. Settings that are wrong
    raise BadRequest when it is made. One that reads a profile has a field `profile`, the path of it, "" being
    none: only the deployment can give it.
    """

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    name: ClassVar[str]
    paper: ClassVar[str]
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = False
    count: ClassVar[Literal["exact", "bound"]] = "bound"
    trained_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_values(self)

    @classmethod
    @abstractmethod
    def everything(cls) -> Self:
        """The pattern with settings by which every row sees all that a dense one does; for tests."""

    @abstractmethod
    def index(self, view: ChunkView) -> AttentionIndex | Skipping | None:
        """What the rows see, as an index of one sequence; None: these rows are dense in this layer.

        In the index, rows number the view's rows, 0 to n - 1; keys are places on the axis, which are slots
        or, with `key_order` and `key_slot` [S], another order of them, one for all heads; `row_order` is
        `view.rows`, `key_begin` zeros [1, Hkv]. Every row of every query head is in one tile and sees itself,
        no key is twice in a tile: `check_index`. Tiles may share lists. Tensors are on the queries' device.
        """


@runtime_checkable
class TellsHeads(Protocol):
    """A pattern whose heads do different things."""

    def of_head(self, view: ChunkView, head: int) -> str:
        """What a query head does, in a few words."""
        ...


@runtime_checkable
class FitsModels(Protocol):
    """A pattern with settings that fit only some models."""

    def check_model(self, *, layers: int, heads: int, width: int) -> None:
        """Raise BadRequest unless they fit one of so many layers and query heads, each `width` wide."""
        ...


PATTERNS: dict[str, str] = {
    "mminference": "mmserve.attention.patterns.mminference:MMInference",
    "vertical_slash": "mmserve.attention.patterns.vertical_slash:VerticalSlash",
    "block_sparse": "mmserve.attention.patterns.block_sparse:BlockSparse",
    "a_shape": "mmserve.attention.patterns.a_shape:AShape",
    "tri_shape": "mmserve.attention.patterns.tri_shape:TriShape",
    "triangle_mix": "mmserve.attention.patterns.triangle_mix:TriangleMix",
    "flexprefill": "mmserve.attention.patterns.flexprefill:FlexPrefill",
    "xattention": "mmserve.attention.patterns.xattention:XAttention",
    "anchor": "mmserve.attention.patterns.anchor:AnchorAttention",
    "vecattention": "mmserve.attention.patterns.vecattention:VecAttention",
    "critiprefill": "mmserve.attention.patterns.critiprefill:CritiPrefill",
    "sparge": "mmserve.attention.patterns.sparge:Sparge",
    "power": "mmserve.attention.patterns.power:PowerAttention",
    "hip": "mmserve.attention.patterns.hip:HiP",
    "skip_softmax": "mmserve.attention.patterns.skip_softmax:SkipSoftmax",
    "zipvl": "mmserve.attention.patterns.zipvl:ZipVL",
    "loopserve": "mmserve.attention.patterns.loopserve:LoopServe",
    "quest": "mmserve.attention.selection:Quest",
    "flux": "mmserve.attention.patterns.flux:Flux",
    "infllm_v2": "mmserve.attention.patterns.infllm_v2:InfLLMv2",
}

PROFILE = "profile"  # the field of patterns that read one
# a setting of all patterns: of so many layers the first one looks, the others see what it found
REUSE_EVERY = "reuse_every"


def load_pattern(name: str) -> type[AttentionPattern]:
    """The class behind a registered name: a dataclass whose fields are its settings."""
    if name not in PATTERNS:
        raise BadRequest(f"Expected attention to be dense or one of {', '.join(PATTERNS)}, but got {name!r}")
    module, _, attribute = PATTERNS[name].partition(":")
    return cast("type[AttentionPattern]", getattr(import_module(module), attribute))


def takes_profile(pattern: type[AttentionPattern]) -> bool:
    return any(field.name == PROFILE for field in dataclasses.fields(pattern))


def reuse_every(settings: Mapping[str, object]) -> int:
    """How many layers share what the first of them finds; raises BadRequest where that is no number."""
    every = settings.get(REUSE_EVERY, 1)
    check_count(REUSE_EVERY, every, 1, 1024)
    return cast("int", every)


def make_pattern(name: str, profile: str | None = None, /, **settings: object) -> AttentionPattern:
    """Build a pattern; wrong names or values raise BadRequest."""
    method = load_pattern(name)
    if PROFILE in settings:
        raise BadRequest("Expected attention_options without a profile, which only a deployment chooses")
    reuse_every(settings)
    settings.pop(REUSE_EVERY, None)
    check_settings(name, method, settings)
    if profile is not None and takes_profile(method):
        settings[PROFILE] = profile
    return cast("Callable[..., AttentionPattern]", method)(**settings)
