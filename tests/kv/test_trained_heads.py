"""Policies with trained heads or profiles against what their files say, one number at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmserve.kv.base import make_policy
from tests.kv.oracle import HEADS, SCENE, SLOTS, Scores, check, flat_best, per_head, with_recent
from tests.kv.scene import GROUP, HIDDEN, KV_HEADS, LAYERS, WIDTH


def test_duo(tmp_path: Path) -> None:
    gates = [[0.3, 0.9], [0.5, 0.1], [0.2, 0.8]]
    (tmp_path / "gates").write_text(json.dumps({"gates": gates}))
    policy = make_policy("duo", weights=str(tmp_path / "gates"), sink=4, recent=6)
    # slots 3 and 19: text is 0 to 2 and 20 to 24
    streaming, every = [0, 16], list(range(17))
    # 6 heads of 2, and then 15 more for each that keeps everything
    for budget, whole in ((2, 0), (4, 0), (5, 1), (7, 2), (10, 3), (17, 6)):
        chosen = sorted((-gates[at][head], at, head) for at in range(LAYERS) for head in HEADS)[:whole]
        keep_all = {place[1:] for place in chosen}
        check(
            policy,
            budget,
            [[every if (at, head) in keep_all else streaming for head in HEADS] for at in range(LAYERS)],
        )
    check(policy, 1, [[[0]] * KV_HEADS] * LAYERS)


def test_kvzap(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    scores: Scores = []
    for layer in range(LAYERS):
        first, second = torch.randn(4, HIDDEN, generator=generator), torch.randn(2, 4, generator=generator)
        tensors |= {f"layers.{layer}.0.weight": first, f"layers.{layer}.2.weight": second}
        inner = SCENE.hidden[layer] @ first.T
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        scores.append(
            [[float(row[head]) for row in (gelu @ second.T)[SLOTS.start : SLOTS.stop]] for head in HEADS]
        )
    save_file(tensors, tmp_path / "heads")
    policy = make_policy("kvzap", weights=str(tmp_path / "heads"), window=7)
    sure = with_recent(scores, [2] * LAYERS)
    check(policy, 5, flat_best(sure, 5 * KV_HEADS * LAYERS))
    least = make_policy("kvzap", weights=str(tmp_path / "heads"), window=7, threshold=0.25)
    expected = [[[i for i, value in enumerate(head) if value >= 0.25] for head in layer] for layer in sure]
    check(least, SCENE.visual, expected)


def test_locret(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    width = (KV_HEADS * GROUP + 2 * KV_HEADS) * WIDTH
    tensors: dict[str, torch.Tensor] = {}
    scores: Scores = []
    for layer in range(LAYERS):
        first, second = torch.randn(4, width, generator=generator), torch.randn(2, 4, generator=generator)
        at = f"model.layers.{layer}.self_attn"
        tensors |= {f"{at}.fc1.weight": first, f"{at}.fc2.weight": second}
        queries, keys = SCENE.plain[layer]
        x = torch.cat(
            [queries.flatten(1), keys.flatten(1), SCENE.values[layer].transpose(0, 1).flatten(1)], 1
        )
        inner = x @ first.T
        found = (inner * inner.sigmoid()) @ second.T
        scores.append([[float(found[slot, head]) for slot in SLOTS] for head in HEADS])
    save_file(tensors, tmp_path / "heads")
    policy = make_policy("locret", weights=str(tmp_path / "heads"), window=7)
    check(policy, 5, per_head(with_recent(scores, [2] * LAYERS), [5] * LAYERS))
