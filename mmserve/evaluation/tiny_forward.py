"""The language model of `tiny` over training rows, with attention as sparse as its mask.

Computes what transformers' Qwen2 computes with the masks of `carriers` and of the row's branches, without
ever making the square of a long context. Knows nothing about losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model, Qwen2RMSNorm

from mmserve.evaluation.carriers import remaining
from mmserve.evaluation.tiny_rows import Row, frame_ends


class RowAttention:
    """Attention of one row; queries, keys and values are [1, heads, S, head size]."""

    def __init__(self, row: Row, *, carriers: bool) -> None:
        self.context = len(row.frame)
        self.carriers = carriers and bool((row.frame >= 0).any())
        order = torch.arange(self.context)
        kept = remaining(row.frame) if self.carriers else torch.ones_like(order, dtype=torch.bool)
        self.kept = kept.nonzero()[:, 0]
        seen = self.kept[None, :] < row.sees[:, None]
        mine = (row.branch[:, None] == row.branch[None, :]) & _triangle(len(row.branch))
        self.branch_mask = torch.cat([seen, mine], 1)
        if self.carriers:
            ends = frame_ends(row)
            size = int((row.frame == row.frame[ends[0]]).sum())
            self.raw = ends[:, None] + torch.arange(1 - size, 1)
            before = self.kept[None, :] < self.raw[:, :1]
            own = _triangle(size)
            self.frame_mask = torch.cat(
                [before[:, None].expand(-1, size, -1), own.expand(len(ends), -1, -1)], 2
            )[:, None]
            self.plain = (row.frame < 0).nonzero()[:, 0]
            self.plain_mask = self.kept[None, :] <= self.plain[:, None]
            self.back = torch.cat([self.raw.flatten(), self.plain]).argsort()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        end = self.context
        if self.carriers:
            keys, values = key[:, :, self.kept], value[:, :, self.kept]
            seen = self._frames(query, key, value, keys, values)
            own = torch.cat([keys, key[:, :, end:]], 2), torch.cat([values, value[:, :, end:]], 2)
        else:
            seen = functional.scaled_dot_product_attention(
                query[:, :, :end], key[:, :, :end], value[:, :, :end], is_causal=True
            )
            own = key, value
        asked = functional.scaled_dot_product_attention(query[:, :, end:], *own, attn_mask=self.branch_mask)
        return torch.cat([seen, asked], 2)

    def _frames(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The context under the semantic mask: frames as a batch, then the text between them."""
        frames, size = self.raw.shape
        queries = query[0, :, self.raw].transpose(0, 1)  # [F, heads, size, head size]
        raw_keys = torch.cat([keys.expand(frames, -1, -1, -1), key[0, :, self.raw].transpose(0, 1)], 2)
        raw_values = torch.cat([values.expand(frames, -1, -1, -1), value[0, :, self.raw].transpose(0, 1)], 2)
        framed = functional.scaled_dot_product_attention(
            queries, raw_keys, raw_values, attn_mask=self.frame_mask
        )
        plain = functional.scaled_dot_product_attention(
            query[:, :, self.plain], keys, values, attn_mask=self.plain_mask
        )
        flat = framed.transpose(0, 1).reshape(1, query.shape[1], frames * size, query.shape[3])
        return torch.cat([flat, plain], 2)[:, :, self.back]


def _triangle(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def embed_row(row: Row, table: Tensor, newline: Tensor) -> Tensor:
    """Input embeddings [1, S, D]."""
    embedded = table[row.tokens]
    embedded = embedded.index_copy(0, row.visual_at, row.visual.to(embedded.dtype))
    lines = newline.expand(len(row.newline_at), -1).to(embedded.dtype)
    return embedded.index_copy(0, row.newline_at, lines)[None]


def row_states(
    language: Qwen2Model, embedded: Sequence[Tensor], rows: Sequence[Row], *, carriers: Sequence[bool]
) -> list[list[Tensor]]:
    """Of each row, the hidden states [1, S, D] after each layer, the last one normalised.

    The rows go through every matrix together, since most are too short to keep one busy.
    """
    attends = [RowAttention(row, carriers=carried) for row, carried in zip(rows, carriers, strict=True)]
    lengths = [len(row.tokens) for row in rows]
    config = language.config
    heads, pairs, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, states = torch.cat(list(embedded), 1), []
    cosine, sine = language.rotary_emb(hidden, torch.cat([row.positions for row in rows])[None])
    cosine, sine = cosine[:, None], sine[:, None]
    length = hidden.shape[1]
    for layer in cast(list[Qwen2DecoderLayer], language.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inner = _norm(hidden, layer.input_layernorm)
        query = attention.q_proj(inner).view(1, length, heads, size).transpose(1, 2)
        key = attention.k_proj(inner).view(1, length, pairs, size).transpose(1, 2)
        value = attention.v_proj(inner).view(1, length, pairs, size).transpose(1, 2)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        key = key.repeat_interleave(heads // pairs, 1)
        value = value.repeat_interleave(heads // pairs, 1)
        parts = zip(attends, *(part.split(lengths, 2) for part in (query, key, value)), strict=True)
        mixed = torch.cat([attend(*part) for attend, *part in parts], 2)
        mixed = mixed.transpose(1, 2).reshape(1, length, heads * size)
        hidden = hidden + attention.o_proj(mixed)
        inner = _norm(hidden, layer.post_attention_layernorm)
        hidden = hidden + mlp.down_proj(functional.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))
        states.append(hidden)
    states[-1] = _norm(hidden, language.norm)
    return [list(of_row) for of_row in zip(*(state.split(lengths, 1) for state in states), strict=True)]


def _norm(hidden: Tensor, norm: Qwen2RMSNorm) -> Tensor:
    normed: Tensor = functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
    return normed


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cosine.to(heads.dtype) + torch.cat([-second, first], -1) * sine.to(heads.dtype)
