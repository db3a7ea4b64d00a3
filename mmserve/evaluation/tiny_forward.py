"""The language model of `tiny` over training rows, with attention as sparse as its mask.

Computes what transformers' Qwen2 computes with the masks of `carriers` and of the row's branches, without
ever making the square of a long context. Knows nothing about losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model, Qwen2RMSNorm

from mmserve.evaluation.tiny_rows import Row, frame_ends
from mmserve.pruning.carriers import remaining

SHORT = 1000  # tokens
STRAY = 1e-3  # attention that does not matter
GATED_FROM = 2  # layers before have yet to find which item a question is about


class RowAttention:
    """Attention of one row; queries, keys and values are [heads, S, head size].

    `strays` collects, layer by layer, how far questions about one item, and the items' own tokens, look
    at other items: minus the logarithm of the share of their attention to media that lands where it
    should. In the first layer no token knows its item and before `GATED_FROM` no question does, so they
    should not look at media at all: `peeks` collects how far they do. `guided` rows are masked to what
    they should see.
    """

    def __init__(self, row: Row, *, heads: int, carriers: bool, guided: bool = False) -> None:
        self.row, self.context = row, len(row.frame)
        self.carriers = carriers and bool((row.frame >= 0).any())
        order = torch.arange(self.context)
        kept = remaining(row.frame) if self.carriers else torch.ones_like(order, dtype=torch.bool)
        self.kept = kept.nonzero()[:, 0]
        seen = self.kept[None, :] < row.sees[:, None]
        mine = (row.branch[:, None] == row.branch[None, :]) & _triangle(len(row.branch))
        self.branch_bias = _bias(torch.cat([seen, mine], 1))
        self.gated_at = row.gated_at - self.context
        shown = row.item[self.kept]
        self.media, self.right = shown >= 0, shown[None, :] == row.gated_item[:, None]
        self.early_bias = _bias(torch.cat([seen & ~self.media, mine], 1)) if guided else None
        self.layer, self.strays, self.peeks = 0, list[Tensor](), list[Tensor]()
        if self.carriers:
            ends = frame_ends(row)
            size = int((row.frame == row.frame[ends[0]]).sum())
            self.raw = ends[:, None] + torch.arange(1 - size, 1)
            before = self.kept[None, :] < self.raw[:, :1]
            own = _triangle(size)
            seen = torch.cat([before[:, None].expand(-1, size, -1), own.expand(len(ends), -1, -1)], 2)
            self.frame_bias = _bias(seen.repeat_interleave(heads, 0))
            self.plain = (row.frame < 0).nonzero()[:, 0]
            self.plain_bias = _bias(self.kept[None, :] <= self.plain[:, None])
            self.back = torch.cat([self.raw.flatten(), self.plain]).argsort()
        self.several = not self.carriers and int(row.item.max()) > 0
        self.fused = not self.several and self.context > SHORT
        if self.carriers or self.fused:
            return
        visible = _triangle(self.context)
        shown = row.item >= 0
        self.other = shown[:, None] & shown[None, :] & ~torch.eye(self.context, dtype=torch.bool)
        self.inside = row.item.clamp(min=0)[:, None]
        self.items = functional.one_hot(row.item + 1)[:, 1:].bfloat16()
        foreign = self.other & (row.item[:, None] != row.item[None, :])
        self.context_bias = _bias(visible & ~foreign if guided else visible)
        self.first_bias = _bias(visible & ~self.other) if guided else self.context_bias

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        end = self.context
        if self.carriers:
            keys, values = key[:, self.kept], value[:, self.kept]
            seen = self._frames(query, key, value, keys, values)
            own = torch.cat([keys, key[:, end:]], 1), torch.cat([values, value[:, end:]], 1)
        else:
            own = key, value
            before = query[:, :end], key[:, :end], value[:, :end]
            if self.fused:
                asking, asked, told = (part[None] for part in before)
                seen = functional.scaled_dot_product_attention(asking, asked, told, is_causal=True)[0]
            else:
                seen, weights = _attend(*before, self.context_bias if self.layer else self.first_bias)
                if self.early_bias is None:
                    self._stray_items(weights)
        early = self.layer < GATED_FROM
        bias = self.early_bias if early and self.early_bias is not None else self.branch_bias
        branches, weights = _attend(query[:, end:], *own, bias)
        if early and self.early_bias is None:
            media = functional.pad(self.media, (0, weights.shape[2] - len(self.media)))
            self.peeks.append(_peek(weights * ~media).mean())
        if len(self.gated_at) and not early:
            looks = weights[:, self.gated_at, : len(self.kept)].float()
            right, media = (looks * self.right).sum(-1), (looks * self.media).sum(-1)
            self.strays.append(((media + STRAY) / (right + STRAY)).log().mean())
        self.layer += 1
        return torch.cat([seen, branches], 1)

    def _stray_items(self, weights: Tensor) -> None:
        if self.layer == 0:
            self.peeks.append(_peek(weights * ~self.other)[:, self.media].mean())
        elif self.several:
            looks = torch.bmm(weights, self.items.to(weights.dtype).expand(len(weights), -1, -1)).float()
            right = looks.gather(2, self.inside.expand(len(weights), -1, -1))[:, :, 0]
            strayed = ((looks.sum(2) + STRAY) / (right + STRAY)).log()
            self.strays.append(strayed[:, self.media].mean())

    def _frames(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The context under the semantic mask: frames as a batch, then the text between them."""
        frames = len(self.raw)
        raw_keys, raw_values = (
            torch.cat([before.expand(frames, -1, -1, -1), raw[:, self.raw].transpose(0, 1)], 2).flatten(0, 1)
            for before, raw in ((keys, key), (values, value))
        )  # [frames * heads, kept + size, head size]
        queries = query[:, self.raw].transpose(0, 1).flatten(0, 1)
        framed, _ = _attend(queries, raw_keys, raw_values, self.frame_bias)
        plain, _ = _attend(query[:, self.plain], keys, values, self.plain_bias)
        flat = framed.unflatten(0, (frames, -1)).transpose(0, 1).flatten(1, 2)
        return torch.cat([flat, plain], 1)[:, self.back]


def _peek(rest: Tensor) -> Tensor:
    return -(rest.sum(-1, dtype=torch.float32) + STRAY).log()


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and weights; on short rows this is twice as fast as the fused kernel of CPUs."""
    bias = bias.to(query.dtype)
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[2] ** -0.5)
    weights = scores.softmax(-1, dtype=scores.dtype)
    return torch.bmm(weights, value), weights


def _bias(visible: Tensor) -> Tensor:
    """What is added to scores, bf16: nothing where something is visible."""
    return torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, -math.inf)


def _triangle(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def embed_row(row: Row, table: Tensor, newline: Tensor) -> Tensor:
    """Input embeddings [1, S, D]."""
    embedded = table[row.tokens]
    embedded = embedded.index_copy(0, row.visual_at, row.visual.to(embedded.dtype))
    lines = newline.expand(len(row.newline_at), -1).to(embedded.dtype)
    return embedded.index_copy(0, row.newline_at, lines)[None]


def row_states(
    language: Qwen2Model, embedded: Sequence[Tensor], attends: Sequence[RowAttention]
) -> list[list[Tensor]]:
    """Of each row, the hidden states [1, S, D] after each layer, the last one normalised.

    The rows go through every matrix together, since most are too short to keep one busy.
    """
    lengths = [len(attend.row.tokens) for attend in attends]
    config = language.config
    heads, pairs, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, states = torch.cat(list(embedded), 1), []
    cosine, sine = language.rotary_emb(hidden, torch.cat([attend.row.positions for attend in attends])[None])
    length = hidden.shape[1]
    for layer in cast(list[Qwen2DecoderLayer], language.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inner = _norm(hidden, layer.input_layernorm)
        query = attention.q_proj(inner).view(length, heads, size).transpose(0, 1)
        key = attention.k_proj(inner).view(length, pairs, size).transpose(0, 1)
        value = attention.v_proj(inner).view(length, pairs, size).transpose(0, 1)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        key = key.repeat_interleave(heads // pairs, 0)
        value = value.repeat_interleave(heads // pairs, 0)
        parts = zip(attends, *(part.split(lengths, 1) for part in (query, key, value)), strict=True)
        mixed = torch.cat([attend(*part) for attend, *part in parts], 1)
        mixed = mixed.transpose(0, 1).reshape(1, length, heads * size)
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
