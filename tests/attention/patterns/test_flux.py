"""Flux's routers, from files, against the paper's modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmserve.attention.patterns.a_shape import AShape
from mmserve.attention.patterns.flux import FULL, POOL, Flux
from mmserve.errors import BadRequest
from tests.attention.patterns.chunks import chunk, seen_by

WIDTH = 16
PREFIX = "model.layers.{}.self_attn.mask_allocator."


class Router(nn.Module):
    """As the authors build it, for queries of `width` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_feat_extractor = nn.Sequential(
            nn.Linear(width, 8 * width), nn.SiLU(), nn.Linear(8 * width, 2 * width)
        )
        self.cls_router_head_agnostic = nn.Sequential(
            nn.Linear(2 * width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        found: Tensor = self.cls_router_head_agnostic(self.cls_feat_extractor(pooled))
        return found


def saved(path: Path, routers: dict[int, Router]) -> str:
    tensors = {
        PREFIX.format(layer) + name: value
        for layer, router in routers.items()
        for name, value in router.state_dict().items()
    }
    save_file({**tensors, "model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, path)
    return str(path)


def pooled(seed: int) -> Tensor:
    """What a router is shown of a chunk."""
    queries = chunk(300, 400, seed=seed).queries
    return torch.cat([queries[:POOL], queries[-POOL:]]).mean(0).mean(0)


def test_a_layer_is_sparse_where_its_router_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    routers = {layer: Router(WIDTH) for layer in (2, 3)}
    for router in routers.values():
        with torch.no_grad():
            logits = torch.stack([router(pooled(seed)) for seed in range(12)])
            router.cls_router_head_agnostic[4].bias -= logits.median(0).values  # type: ignore[operator]
    pattern = Flux(profile=saved(tmp_path / "routers.safetensors", routers), sink=4, local=20)
    said = set()
    for seed in range(12):
        for layer, router in routers.items():
            view = chunk(300, 400, seed=seed, layer=layer)
            with torch.no_grad():
                is_full = int(router(pooled(seed)).argmax()) == FULL
            found = pattern.index(view)
            assert (found is None) == is_full
            if found is not None:
                band = AShape(sink=4, local=20).index(view)
                assert torch.equal(seen_by(found, view), seen_by(band, view))
            said.add(is_full)
    assert said == {True, False}


def test_a_layer_without_a_router_is_dense(tmp_path: Path) -> None:
    pattern = Flux(profile=saved(tmp_path / "routers.safetensors", {2: Router(WIDTH)}))
    assert pattern.index(chunk(300, 400, layer=5)) is None


def test_files_that_are_no_routers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("routers")
    with pytest.raises(BadRequest, match="safetensors"):
        Flux(profile=str(tmp_path / "text"))
    with pytest.raises(BadRequest, match="safetensors"):
        Flux(profile=str(tmp_path / "nothing"))
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(BadRequest, match="found none"):
        Flux(profile=str(tmp_path / "other"))
    name = PREFIX.format(1) + "cls_feat_extractor.0.weight"
    save_file({name: torch.zeros(2, 2)}, tmp_path / "part")
    with pytest.raises(BadRequest, match="whole router"):
        Flux(profile=str(tmp_path / "part"))
    broken = Router(WIDTH)
    broken.cls_router_head_agnostic[4] = nn.Linear(WIDTH, 3)
    with pytest.raises(BadRequest, match="two classes"):
        Flux(profile=saved(tmp_path / "wide", {0: broken}))


def test_routers_of_another_model_are_refused(tmp_path: Path) -> None:
    pattern = Flux(profile=saved(tmp_path / "routers.safetensors", {3: Router(8)}))
    with pytest.raises(BadRequest, match="16 channels"):
        pattern.check_model(layers=8, heads=4, width=16)
