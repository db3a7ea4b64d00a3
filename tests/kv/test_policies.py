"""KV policies: the shared contract over all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmserve.errors import BadRequest
from mmserve.kv.base import POLICIES, KVPolicy, make_policy, slots_kept, visual_budget
from mmserve.methods import NAMES, WITH_WEIGHTS
from tests.kv.scene import GROUP, HIDDEN, KV_HEADS, LAYERS, WIDTH, Scene

SCENE = Scene()
EVERY = sorted(POLICIES)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file for each policy that needs one."""
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = (KV_HEADS * GROUP + 2 * KV_HEADS) * WIDTH
    zap: dict[str, torch.Tensor] = {}
    locret: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        zap |= {f"layers.{layer}.weight": drawn(KV_HEADS, HIDDEN), f"layers.{layer}.bias": drawn(KV_HEADS)}
        at = f"model.layers.{layer}.self_attn"
        locret |= {f"{at}.fc1.weight": drawn(6, width), f"{at}.fc2.weight": drawn(KV_HEADS, 6)}
    save_file(zap, folder / "zap.safetensors")
    save_file(locret, folder / "locret.safetensors")
    gates = {"gates": [[0.1 * layer, 0.9 - 0.1 * layer] for layer in range(LAYERS)]}
    (folder / "duo.json").write_text(json.dumps(gates))
    return {
        "kvzap": str(folder / "zap.safetensors"),
        "locret": str(folder / "locret.safetensors"),
        "duo": str(folder / "duo.json"),
    }


def made(name: str, weights: dict[str, str], **settings: object) -> KVPolicy:
    if name in WITH_WEIGHTS:
        settings |= {"weights": weights[name]}
        settings |= {"recent": 3, "sink": 4} if name == "duo" else {"window": 7}
    return make_policy(name, **settings)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("slots", [4, 1, 0, 16])
def test_a_budget_is_kept(name: str, slots: int, weights: dict[str, str]) -> None:
    policy = made(name, weights)
    kept = SCENE.chosen(policy, slots)
    counts = [len(head) for layer in kept for head in layer]
    for layer in kept:
        assert len(layer) == KV_HEADS
        for head in layer:
            assert head.dtype == np.int64
            assert (np.diff(head) > 0).all()
            assert len(head) == 0 or (head[0] >= 0 and head[-1] < SCENE.visual)
    if name == "none":
        assert counts == [SCENE.visual] * LAYERS * KV_HEADS
    elif policy.count == "exact":
        assert sum(counts) == slots * LAYERS * KV_HEADS
    else:
        assert sum(counts) <= slots * LAYERS * KV_HEADS
    if policy.granularity == "token":
        assert all(np.array_equal(head, kept[0][0]) for layer in kept for head in layer)
    elif policy.granularity == "layer":
        assert all(np.array_equal(head, layer[0]) for layer in kept for head in layer)


@pytest.mark.parametrize("name", EVERY)
def test_the_whole_budget_keeps_all_unless_it_is_a_bound(name: str, weights: dict[str, str]) -> None:
    policy = made(name, weights)
    kept = SCENE.chosen(policy, SCENE.visual)
    if policy.count == "exact" or name in ("duo", "kvzap"):
        assert all(len(head) == SCENE.visual for layer in kept for head in layer)


@pytest.mark.parametrize("name", EVERY)
def test_a_choice_is_repeatable_and_does_not_depend_on_chunks(name: str, weights: dict[str, str]) -> None:
    policy = made(name, weights)
    first, *others = (SCENE.chosen(policy, 4, chunk=chunk) for chunk in (1000, 1000, 1, 5))
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_a_policy_declares_itself(name: str, weights: dict[str, str]) -> None:
    policy = made(name, weights)
    assert policy.name == name
    assert name in NAMES["kv"]
    assert policy.trained_weights == (name in WITH_WEIGHTS)
    assert policy.paper.startswith("arXiv:") or name in ("none", "random")
    assert policy.acts_at == "prefill_end"
    asks = Scene(after=0)
    if policy.needs_query and policy.probe() is None:
        with pytest.raises(BadRequest, match="text after"):
            asks.chosen(policy, 4)
    elif policy.probe() is None:
        asks.chosen(policy, 4)


@pytest.mark.parametrize("name", WITH_WEIGHTS[1:])
def test_without_its_file_a_policy_says_so(name: str, tmp_path: Path, weights: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match=r"kv_options\.weights"):
        SCENE.chosen(make_policy(name), 4)
    (tmp_path / "broken").write_bytes(b"{}")
    with pytest.raises(BadRequest, match=r"kv_options\.weights"):
        SCENE.chosen(make_policy(name, weights=str(tmp_path / "broken")), 4)
    other = weights["kvzap" if name == "locret" else "locret"]
    with pytest.raises(BadRequest, match=r"kv_options\.weights"):
        SCENE.chosen(make_policy(name, weights=other), 4)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0.29, 4), (0.01, 1), (1.0, 17), (12, 4), (5, 0), (99, 17)],
)
def test_a_budget_counts_visual_slots_or_all(budget: float, expected: int) -> None:
    assert visual_budget(budget, 25, 17) == expected


def test_text_stays() -> None:
    visual = np.array([False, True, True, False, True])
    assert slots_kept(visual, np.array([0, 2])).tolist() == [0, 1, 3, 4]
    assert slots_kept(visual, np.array([], np.int64)).tolist() == [0, 3]


def test_an_unknown_policy_or_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=r"none, random, snapkv, .* but got h3o"):
        make_policy("h3o")
    with pytest.raises(BadRequest, match="settings of snapkv to be one of window, pool, pooling"):
        make_policy("snapkv", windows=3)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("snapkv", "window", 65),
        ("snapkv", "pool", 4),
        ("snapkv", "pooling", "sum"),
        ("adakv", "floor", 1.5),
        ("h2o", "recent", -0.1),
        ("expected", "covariance", 1),
        ("look_m", "merging", "none"),
        ("random", "seed", "1"),
        ("streaming", "sink", 0.5),
        ("zipvl", "tau", 2),
        ("kvzip", "chunk", 1),
    ],
)
def test_a_wrong_value_is_refused(name: str, setting: str, value: object) -> None:
    with pytest.raises(BadRequest, match=f"Expected {setting}"):
        make_policy(name, **{setting: value})
