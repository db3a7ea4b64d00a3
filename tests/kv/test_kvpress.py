"""Our choice of slots equals kvpress's on the same small model; see tests/fixtures/record_kvpress.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention.paged import PagedAttention, SequenceRows, Watch
from mmserve.kv.base import Budgeted, KVPolicy, LayerView, Observer, Rows
from mmserve.kv.policies.adakv import AdaKV
from mmserve.kv.policies.expected import ExpectedAttention
from mmserve.kv.policies.knorm import KeyNorm
from mmserve.kv.policies.pyramidkv import PyramidKV, pyramid
from mmserve.kv.policies.snapkv import SnapKV
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import DecoderConfig, TextDecoder
from mmserve.models.rope import rope_frequencies

Json = dict[str, Any]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "kvpress.json"
FAMILIES = ("llama", "qwen2")
SINK = 4


@lru_cache(maxsize=1)
def recorded() -> Json:
    found: Json = json.loads(FIXTURE.read_text("utf-8"))
    return found


def names() -> list[str]:
    return list(recorded()["kept"]["llama"])


def drawn(name: str, shape: Sequence[int], number: int) -> Tensor:
    """As the recorder draws it."""
    if name.endswith("norm.weight"):
        return torch.ones(tuple(shape))
    values = np.random.default_rng([recorded()["seed"], number]).standard_normal(tuple(shape))
    return torch.from_numpy((values * (0.1 if name.endswith("bias") else 0.4)).astype(np.float32))


@lru_cache(maxsize=2)
def model(family: str) -> TextDecoder:
    """The recorder's model: parameters in the order of their names in transformers."""
    config = recorded()["config"]
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_heads, width = config["num_key_value_heads"], hidden // heads
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (config["vocab_size"], hidden),
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, wide)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, heads * width)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (count * width, hidden)
            if family == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (count * width,)
    values = {name: drawn(name, shapes[name], number) for number, name in enumerate(sorted(shapes))}
    decoder = TextDecoder(
        DecoderConfig(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=wide,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
            tied=False,
            qkv_bias=family == "qwen2",
            o_bias=False,
            mlp_bias=False,
            qk_norm=False,
        )
    ).eval()
    state = {}
    for name in decoder.state_dict():
        theirs = name if name.startswith("lm_head") else f"model.{name}"
        parts = [theirs.replace("qkv_proj", f"{one}_proj") for one in "qkv"] if "qkv" in name else [theirs]
        state[name] = torch.cat([values[part] for part in parts])
    decoder.load_state_dict(state)
    return decoder


@dataclass
class Run:
    """One pass of the whole prompt."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    def view(self, layer: int, visual: Tensor, window: int, observer: Observer | None) -> LayerView:
        rows = len(visual)
        order = torch.arange(rows)
        return LayerView(
            layer=layer,
            layers=len(self.keys),
            queries=self.queries[layer][rows - window :],
            query_order=order[rows - window :],
            keys=self.keys[layer],
            values=self.values[layer],
            visual=visual,
            order=order,
            position=order,
            next_position=rows,
            frequencies=rope_frequencies(self.keys[layer].shape[-1], recorded()["config"]["rope_theta"]),
            sums={} if observer is None else observer.sums(layer, order),
        )


def run(family: str, observer: Observer | None) -> Run:
    decoder, ids = model(family), recorded()["ids"]
    config, rows = decoder.config, len(ids)
    table = PageTable(config.layers, config.kv_heads, 200, 16)
    store = PageStore(200, 16, config.head_dim)
    order = np.arange(rows, dtype=np.int32)
    table.append("s", order, order)
    queries: list[Tensor] = []

    def see(layer: int, found: Tensor, hidden: Tensor) -> None:
        queries.append(found)
        if observer is not None:
            observer.see(
                Rows(
                    layer=layer,
                    queries=found,
                    hidden=hidden,
                    order=order,
                    position=order,
                    key_order=order,
                    key_until=None,
                    frequencies=rope_frequencies(config.head_dim, config.rope_theta),
                    read=lambda: store.read(table.slots("s", layer)),
                )
            )

    attention = PagedAttention(table, store, [SequenceRows("s", 0, rows)], watch=[Watch(range(rows), see)])
    with torch.inference_mode():
        embeddings = decoder.embed(torch.tensor(ids))
        decoder(embeddings, torch.from_numpy(order), attention.attend, None, attention.tap)
    read = [store.read(table.slots("s", layer)) for layer in range(config.layers)]
    return Run(queries, [keys for keys, _ in read], [values for _, values in read])


def policy_of(name: str, kept: int) -> tuple[KVPolicy, int, int]:
    """Ours, the slots at the beginning that always stay, and those at the end."""
    window = recorded()["window"]
    # a floor that counts the window's slots too, of those that are kept
    floor = max(int(kept * 0.4) - window, 0) / max(kept - window, 1)
    snap = {"window": window, "pool": 5}
    return {
        "snapkv": (SnapKV(window=window, pool=5), 0, window),
        "knorm": (KeyNorm(), 0, 0),
        "expected": (ExpectedAttention(floor=1.0), SINK, 0),
        "pyramidkv": (PyramidKV(window=window, pool=5), 0, window),
        "adakv snapkv": (AdaKV(**snap, pooling="mean", floor=floor), 0, window),
        "adakv expected": (
            ExpectedAttention(epsilon=1e-2, floor=max(int(kept * 0.2) - SINK, 0) / (kept - SINK)),
            SINK,
            0,
        ),
    }[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", names())
def test_what_is_kept_equals_kvpress(family: str, name: str) -> None:
    kind, _, ratio = name.rpartition(" ")
    theirs = recorded()["kept"][family][name]
    rows, layers = len(recorded()["ids"]), len(theirs)
    kept = int(rows * (1 - float(ratio)) + 1e-9)
    policy, first, last = policy_of(kind, kept)
    observer = policy.observer()
    done = run(family, observer)
    visual = torch.ones(rows, dtype=torch.bool)
    visual[:first], visual[rows - last :] = False, False
    slots = [kept - first - last] * layers
    if kind == "pyramidkv":
        # kvpress counts the window's slots as part of every layer's budget
        even = pyramid([kept] * layers, [rows - last] * layers, 20)
        assert even == [len(layer[0]) for layer in theirs]
        slots = [count - last for count in even]
    views = [done.view(layer, visual, max(last, 1), observer) for layer in range(layers)]
    scores = [policy.scores(view) for view in views]
    chosen = (
        SnapKV.allocate(policy, scores, Budgeted(slots, [1.0] * layers))
        if isinstance(policy, PyramidKV)
        else policy.allocate(scores, Budgeted(slots, [1.0] * layers))
    )
    for ours, layer in zip(chosen, theirs, strict=True):
        for head, expected in zip(ours, layer, strict=True):
            always = [*range(first), *range(rows - last, rows)]
            assert sorted([*always, *(head + first).tolist()]) == expected
