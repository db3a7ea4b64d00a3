"""The text decoder of Qwen2, Qwen3 and Llama-shaped language models, over packed tokens.

It computes everything but attention: the caller's `attend` owns the KV cache, causality and the
batch. Knows nothing about sequences, pages or images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmserve.models.linear import Linear
from mmserve.models.rope import rope_angles, rope_frequencies_on, rotate


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From rotated q [N, Hq, d], rotated k and v [N, Hkv, d] of new tokens to outputs [N, Hq, d]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool


Tap = Callable[[Tensor], None]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """`qkv_proj` is the three projections of a checkpoint in one, queries first."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend
    ) -> Tensor:
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        out = attend(layer, rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v)
        return self.o_proj.plus(out.reshape(len(x), -1), residual)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        outer, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(outer, inner, bias=config.mlp_bias)
        self.up_proj = Linear(outer, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, outer, bias=config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down_proj.plus(self.up_proj.times(x, self.gate_proj.silu(x)), residual)


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend, tap: Tap | None = None
    ) -> Tensor:
        inputs = self.input_layernorm(x)
        if tap is not None:
            tap(inputs)
        x = self.self_attn(inputs, x, cos, sin, layer, attend)
        out: Tensor = self.mlp(self.post_attention_layernorm(x), x)
        return out


class TextDecoder(nn.Module):
    """Parameter names are those of a checkpoint's language model but for what `MERGED` says."""

    # our parameter -> those of the checkpoint that are stacked into it
    MERGED: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [N, D] of token ids [N]."""
        return functional.embedding(ids, self.embed_tokens.weight)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        layers: range | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """Hidden states [N, D] after the final norm, for embeddings [N, D] at RoPE positions [N].

        With `layers` only these run: `x` is the input of their first, and without the last layer of all
        nothing is normed. `tap` is shown the normed inputs of each layer before it attends.
        """
        config = self.config
        frequencies = rope_frequencies_on(x.device, config.head_dim, config.rope_theta)
        cos, sin = rope_angles(positions, frequencies, x.dtype)
        layers = range(config.layers) if layers is None else layers
        for index in layers:
            x = self.layers[index](x, cos, sin, index, attend, tap)
        hidden: Tensor = self.norm(x) if layers.stop == config.layers else x
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 scores [N, V] over the vocabulary."""
        if self.lm_head is None:
            return functional.linear(hidden, self.embed_tokens.weight).float()
        scores: Tensor = self.lm_head(hidden)
        return scores.float()
