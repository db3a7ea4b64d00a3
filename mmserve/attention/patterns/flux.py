"""Flux Attention: a small network looks at a layer's queries and says whether the layer may be sparse.

Knows nothing about scores, pages or models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.a_shape import ALL, AShape, frames_instead, local_slots, sink_slots
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import check_values, setting

# rows at either end of a chunk that the router looks at
POOL = 100
# of the router's two classes
FULL = 1
# a router's linear layers, in order, as checkpoints name them, and whether a SiLU follows
LINEAR = {
    "cls_feat_extractor.0": True,
    "cls_feat_extractor.2": False,
    "cls_router_head_agnostic.0": True,
    "cls_router_head_agnostic.2": True,
    "cls_router_head_agnostic.4": False,
}
_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?(cls_\w+\.\d)\.(weight|bias)")


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor
    has_silu: bool


_Router = tuple[_Linear, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flux(AttentionPattern):
    """A layer that its router finds sparse is A-shaped in this chunk, others are dense.

    `profile` is a safetensors file of routers, named as in the published checkpoints
    (`...layers.3.self_attn.mask_allocator.cls_feat_extractor.0.weight`); a layer that it lacks is dense,
    without a file all are. A router gets the mean over heads of the queries of the first and the last 100
    rows. The paper routes a whole prompt once, here each chunk is routed by its own rows; and the paper's
    queries are not rotated yet, these are. So routers have to be trained on what is served; none are shipped.
    """

    name: ClassVar[str] = "flux"
    paper: ClassVar[str] = "https://arxiv.org/abs/2604.07394"
    trained_weights: ClassVar[bool] = True

    profile: str = setting("", "a file of routers, which only a deployment names: --attention-profile")
    sink: int = sink_slots(128)
    local: int = local_slots(1024)
    local_frames: int = frames_instead()

    def __post_init__(self) -> None:
        check_values(self)
        if self.profile:
            _routers(self.profile)

    @classmethod
    def everything(cls) -> Self:
        return cls(local=ALL)

    def check_model(self, *, layers: int, heads: int, width: int) -> None:
        routers = _routers(self.profile).values() if self.profile else ()
        if any(router[0].weight.shape[1] != width for router in routers):
            raise BadRequest(f"Expected routers of flux for queries of {width} channels, but got others")

    def index(self, view: ChunkView) -> AttentionIndex | None:
        return None if self._is_full(view) else self._sparse().index(view)

    def _sparse(self) -> AShape:
        return AShape(sink=self.sink, local=self.local, local_frames=self.local_frames)

    def _is_full(self, view: ChunkView) -> bool:
        router = _routers(self.profile).get(view.layer) if self.profile else None
        if router is None:
            return True
        found = torch.cat([view.queries[:POOL], view.queries[-POOL:]]).float().mean((0, 1))
        for weight, bias, has_silu in router:
            found = functional.linear(found, weight.to(found.device), bias.to(found.device))
            found = functional.silu(found) if has_silu else found
        return int(found.argmax()) == FULL


@lru_cache(maxsize=4)
def _routers(path: str) -> dict[int, _Router]:
    """Routers by layer; BadRequest where they are not whole."""
    parts: dict[int, dict[str, Tensor]] = defaultdict(dict)
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                if match := _NAME.fullmatch(name):
                    parts[int(match[1])][f"{match[2]}.{match[3]}"] = file.get_tensor(name).float()
    except (OSError, SafetensorError) as error:
        raise BadRequest("Expected the profile of flux to be a safetensors file of routers") from error
    routers = {layer: _router(layer, tensors) for layer, tensors in parts.items()}
    if not routers:
        raise BadRequest("Expected the profile of flux to have routers, but found none")
    return routers


def _router(layer: int, tensors: dict[str, Tensor]) -> _Router:
    missing = [name for name in LINEAR if {f"{name}.weight", f"{name}.bias"} - tensors.keys()]
    if missing:
        raise BadRequest(f"Expected a whole router of flux in layer {layer}, but {missing[0]} is not there")
    router = tuple(
        _Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"], has_silu)
        for name, has_silu in LINEAR.items()
    )
    fits = all(one.weight.shape[0] == other.weight.shape[1] for one, other in pairwise(router))
    if not fits or router[-1].weight.shape[0] != 2:
        raise BadRequest(f"Expected a router of flux with two classes in layer {layer}, but got other shapes")
    return router
