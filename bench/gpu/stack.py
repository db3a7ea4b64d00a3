"""Some layers of a real decoder over a prompt so long that only attention sees it at once.

Products, norms and rotations take the prompt in chunks of rows, since what an MLP holds of a million rows
does not fit into a GPU. Weights are random, so there is no grid in what they attend to: every head takes the
likeliest class of one given stride, and nothing is said about accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmserve.bench.gpu.dense import causal_index
from mmserve.bench.gpu.engine import EXACT_TOLERANCE, make_decoder, text_config
from mmserve.bench.gpu.grid import Grid, choose, index_of
from mmserve.bench.gpu.measure import Session, random, timed
from mmserve.bench.gpu.peers import sdpa
from mmserve.bench.pairing import Metric
from mmserve.kernels.norm_rope import rms_norm, rope_append
from mmserve.kernels.prefill_attention import prefill_attention
from mmserve.models.decoder import DecoderConfig, Layer, TextDecoder
from mmserve.models.rope import rope_frequencies_on

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q [S, Hq, d] and k, v [S, Hkv, d], all rotated
GATE = 8.3
CHECKED_LAYERS = 2
UNTIMED_VOCABULARY = 128
SLOWER = 1.2  # than attention alone is the whole of the layers, at most
WARM_UP_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSizes:
    geometry: str = "ov-7b"
    layers: int = 4
    length: int = 1 << 20
    chunk: int = 1 << 14
    stride: int = 196  # tokens per frame
    checked_rows: int = 2048


def end_to_end(session: Session, sizes: StackSizes, grid: Grid, dense_s: Mapping[str, float]) -> None:
    """`dense_s` is what dense attention of one layer took; the fastest is the peer here."""
    name = f"sparse_{sizes.length}_end_to_end"
    best = min((side for side in dense_s if side != "flex"), key=lambda side: dense_s[side])
    if not session.has_time(name, SLOWER * sizes.layers * dense_s[best] + WARM_UP_S):
        return
    config = replace(text_config(sizes.geometry), vocab_size=UNTIMED_VOCABULARY)
    _check(session, replace(config, layers=CHECKED_LAYERS), sizes, grid)
    decoder = make_decoder(replace(config, layers=sizes.layers), session, session.dtype)
    # as many candidates as elsewhere: trying them is part of the time
    forced = replace(grid, strides=(sizes.stride,) * len(grid.strides), min_lift=-1.0)
    sides = {"ours": partial(_grid_attention, forced), "peer": partial(dense_attention, best)}

    def seconds(side: str, length: int) -> float:
        x = random((length, config.hidden_size), session, 5)
        return timed(partial(run_layers, decoder, x, sides[side], sizes.chunk), session.device)

    layers = text_config(sizes.geometry).layers
    taken = {}
    for side in sides:
        seconds(side, sizes.checked_rows)  # compiles
        taken[side] = seconds(side, sizes.length) * layers / sizes.layers
        session.tell(f"{name} {side}: {taken[side]:.4g} s")
    session.add(
        Metric(name=name, unit="s", gate=GATE),
        [taken["ours"]],
        [taken["peer"]],
        peer_is=f"the same layers with {best}",
        scaled_from=f"{sizes.layers} of {layers} layers",
        stride=sizes.stride,
    )


@torch.inference_mode()
def run_layers(decoder: TextDecoder, x: Tensor, attention: Attention, chunk: int) -> Tensor:
    """Hidden states after the last layer, not normed, in place of the embeddings x [S, D] of one prompt."""
    config, eps = decoder.config, decoder.config.rms_norm_eps
    q = x.new_empty(len(x), config.heads, config.head_dim)
    k, v = (x.new_empty(len(x), config.kv_heads, config.head_dim) for _ in range(2))
    chunks = [slice(start, start + chunk) for start in range(0, len(x), chunk)]
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        for rows in chunks:
            normed, _ = rms_norm(x[rows], layer.input_layernorm.weight, eps=eps)
            qkv = layer.self_attn.qkv_proj(normed).view(len(normed), -1, config.head_dim)
            q[rows] = _rotated(config, qkv, rows.start, k, v)
        out = attention(q, k, v)
        for rows in chunks:
            added = layer.self_attn.o_proj(out[rows].flatten(1))
            weight = layer.post_attention_layernorm.weight
            normed, total = rms_norm(x[rows], weight, eps=eps, residual=added)
            mlp = layer.mlp
            added = mlp.down_proj(mlp.up_proj.times(normed, mlp.gate_proj.silu(normed)))
            torch.add(total, added, out=x[rows])
        del out
    return x


def _rotated(config: DecoderConfig, qkv: Tensor, start: int, k: Tensor, v: Tensor) -> Tensor:
    """Queries; keys and values go to their rows, which are pages of one slot each."""
    kv_heads, d = k.shape[1:]
    positions = torch.arange(start, start + len(qkv), dtype=torch.int32, device=qkv.device)
    slots = positions.long() * kv_heads + torch.arange(kv_heads, device=qkv.device)[:, None]
    frequencies = rope_frequencies_on(qkv.device, d, config.rope_theta)
    pages = (tensor.view(-1, 1, d) for tensor in (k, v))
    return rope_append(qkv, positions, frequencies, slots, *pages)


def _grid_attention(grid: Grid, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[2] ** -0.5
    strides = torch.tensor(grid.strides, dtype=torch.int32, device=q.device)
    index = index_of(choose(q, k, strides, grid, scale=scale), len(q), k.shape[1], grid)
    return prefill_attention(q, k, v, index, scale=scale).out


def dense_attention(side: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By our kernel (`dense`) or one of torch's, those one KV head after the other."""
    if side == "dense":
        return prefill_attention(q, k, v, causal_index(q, k), scale=q.shape[2] ** -0.5).out
    out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        parts = (x.transpose(0, 1)[None].contiguous() for x in (q[:, heads], k[:, [head]], v[:, [head]]))
        out[:, heads] = sdpa(*parts, is_causal=True)[side]()[0].transpose(0, 1)
    return out


def _check(session: Session, config: DecoderConfig, sizes: StackSizes, grid: Grid) -> None:
    """The layers in chunks against the decoder itself, dense and with a grid that no head takes."""
    decoder = make_decoder(config, session, torch.float32)
    x = random((sizes.checked_rows, config.hidden_size), session, 6).float()
    positions = torch.arange(len(x), dtype=torch.int32, device=x.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    with torch.inference_mode():
        expected = decoder(x, positions, attend)
    none = replace(grid, min_lift=1.0)
    for what, attention in (
        ("dense", partial(dense_attention, "dense")),
        ("a grid that no head takes", partial(_grid_attention, none)),
    ):
        hidden = run_layers(decoder, x.clone(), attention, sizes.checked_rows // 3)
        found, _ = rms_norm(hidden, decoder.norm.weight, eps=config.rms_norm_eps)
        name = f"{config.layers} layers of {sizes.geometry} in fp32, {what}"
        session.check(name, found, expected, EXACT_TOLERANCE)
