"""The decoder's forward pass for a GPU: what stands between two products is one kernel.

The numbers are those of `TextDecoder.forward` up to rounding. Knows nothing about sequences or pages.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from mmserve.kernels.norm_rope import rms_norm
from mmserve.models.decoder import Layer, RMSNorm, Tap, TextDecoder
from mmserve.models.rope import rope_frequencies_on


class Rotation(NamedTuple):
    """How queries and keys become those of their positions: normed where there are weights, then turned."""

    positions: Tensor  # int32 [N]
    frequencies: Tensor  # fp32 [d / 2]
    q_weight: Tensor | None  # [d]
    k_weight: Tensor | None
    eps: float


class AttendProducts(Protocol):
    def __call__(self, layer: int, qkv: Tensor, rotation: Rotation) -> Tensor:
        """From products qkv [N, Hq + 2 * Hkv, d] of new tokens, not rotated yet, to outputs [N, Hq, d]."""
        ...


def fused_forward(
    decoder: TextDecoder,
    x: Tensor,
    positions: Tensor,
    attend: AttendProducts,
    layers: range | None = None,
    tap: Tap | None = None,
) -> Tensor:
    """As `TextDecoder.forward`."""
    config, eps = decoder.config, decoder.config.rms_norm_eps
    frequencies = rope_frequencies_on(x.device, config.head_dim, config.rope_theta)
    added: Tensor | None = None  # to the residual stream x, by the norm that comes next
    layers = range(config.layers) if layers is None else layers
    for index in layers:
        layer = decoder.layers[index]
        assert isinstance(layer, Layer)
        block, mlp = layer.self_attn, layer.mlp
        normed, x = rms_norm(x, layer.input_layernorm.weight, eps=eps, residual=added)
        if tap is not None:
            tap(normed)
        qkv = block.qkv_proj(normed).view(len(x), -1, config.head_dim)
        rotation = Rotation(positions, frequencies, _weight(block.q_norm), _weight(block.k_norm), eps)
        out = attend(index, qkv, rotation)
        added = block.o_proj(out.reshape(len(x), -1))
        normed, x = rms_norm(x, layer.post_attention_layernorm.weight, eps=eps, residual=added)
        added = mlp.down_proj(mlp.up_proj.times(normed, mlp.gate_proj.silu(normed)))
    if layers.stop < config.layers:
        return x if added is None else x + added
    hidden, _ = rms_norm(x, decoder.norm.weight, eps=eps, residual=added)
    return hidden


def _weight(norm: nn.Module) -> Tensor | None:
    return norm.weight if isinstance(norm, RMSNorm) else None
