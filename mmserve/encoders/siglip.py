"""LLaVA-OneVision's eyes: the SigLIP tower of transformers, the projector, pooling and packing.

The tower's layers are run one by one, so that layers behind the last used one never run and the
attention map of one layer is enough for saliency. Knows nothing about checkpoints or pixels' origin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaOnevisionConfig, SiglipVisionModel
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionMultiModalProjector,
    get_anyres_image_grid_shape,
    unpad_image,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from mmserve.encoders.attention import NAME as ATTENTION
from mmserve.encoders.base import Encoded, EncodedImage, Features
from mmserve.errors import ConfigError

FRAMES_PER_BATCH = {"cpu": 2, "cuda": 8}  # on a CPU, more fall out of its caches


class SiglipEncoder(nn.Module):
    """Parameter names: `tower.*`, `projector.*` as in transformers, and `newline`."""

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__()
        self.config = config
        chosen = config.vision_feature_layer
        total = config.vision_config.num_hidden_layers + 1  # states: the embeddings, then one per layer
        # how many layers stand before each chosen state
        self.depths = [depth % total for depth in (chosen if isinstance(chosen, list) else [chosen])]
        if max(self.depths) == 0:
            raise ConfigError("Expected vision_feature_layer to name a layer, but got the embeddings alone")
        vision = type(config.vision_config).from_dict(
            config.vision_config.to_dict() | {"num_hidden_layers": max(self.depths), "vision_use_head": False}
        )
        vision._attn_implementation = ATTENTION
        self.tower = SiglipVisionModel(vision)
        self.tower.post_layernorm = nn.Identity()  # the used states come before it
        self.projector = LlavaOnevisionMultiModalProjector(config)
        self.newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.grid = vision.image_size // vision.patch_size

    def rebuild_buffers(self, device: str) -> None:
        """Create the buffers that checkpoints do not contain, after construction without memory."""
        self.tower.embeddings.position_ids = torch.arange(self.grid**2, device=device)[None]

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Features:
        parts = [self._patches(part) for part in pixels.split(FRAMES_PER_BATCH[self.newline.device.type])]
        return parts[0] if len(parts) == 1 else Features(*map(torch.cat, zip(*parts, strict=True)))

    @torch.inference_mode()
    def frames(self, features: Features) -> Encoded:
        return Encoded(self._pool(features.rows), self._pool(features.saliency[..., None])[..., 0])

    @torch.inference_mode()
    def pack(self, features: Features, original_size: tuple[int, int]) -> EncodedImage:
        return EncodedImage(
            self._pack(features.rows, original_size, self.newline),
            self._pack(features.saliency[..., None], original_size, torch.zeros(1))[:, 0],
            self.newline_rows(original_size, len(features.rows)),
        )

    def newline_rows(self, original_size: tuple[int, int], crops: int) -> Tensor:
        nothing = torch.zeros(crops, self.grid**2, 1, device=self.newline.device)
        return self._pack(nothing, original_size, torch.ones(1))[:, 0] > 0

    def _patches(self, pixels: Tensor) -> Features:
        """Projected features [B, grid * grid, D] and saliency [B, grid * grid] of every patch."""
        states = [self.tower.embeddings(pixels.to(self.newline.device, self.newline.dtype))]
        for layer in self.tower.encoder.layers:
            states.append(layer(states[-1], None))
        saliency = attention_received(layer, states[-2])
        rows = self.projector(torch.cat([states[depth] for depth in self.depths], dim=-1))
        return Features(rows, saliency)

    def _pool(self, rows: Tensor) -> Tensor:
        """Halve the grid: [B, grid * grid, C] to [B, pooled * pooled, C]."""
        maps = rows.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        side = math.ceil(self.grid / 2)
        return functional.interpolate(maps, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)

    def _pack(self, rows: Tensor, original_size: tuple[int, int], newline: Tensor) -> Tensor:
        """One run of rows [M, C] from crops [P, grid * grid, C], a newline after each row of tiles."""
        if len(rows) == 1:
            return torch.cat([rows[0], newline[None].to(rows)])
        side = self.config.vision_config.image_size
        shape = get_anyres_image_grid_shape(original_size, self.config.image_grid_pinpoints, side)
        tiles = rows[1:].view(*shape, self.grid, self.grid, -1)
        # tile row, tile column, y, x, channel -> channel, whole y, whole x
        whole = tiles.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
        whole = unpad_image(whole, original_size)
        height, width = whole.shape[1:]
        limit = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        shrink = math.sqrt(height * width / (limit * self.grid**2))
        if shrink > 1.1:
            size = (int(height // shrink), int(width // shrink))
            whole = functional.interpolate(whole[None], size=size, mode="bilinear")[0]
        ends = newline.to(whole)[:, None, None].expand(*whole.shape[:-1], 1)
        return torch.cat([rows[0], torch.cat([whole, ends], dim=-1).flatten(1).T])


def attention_received(layer: SiglipEncoderLayer, hidden: Tensor) -> Tensor:
    """Mean attention that each patch receives in a layer, over heads and query rows: fp32 [B, N]."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    q, k = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    # one picture at a time: the maps of a batch would be the largest tensors of the encoder
    received = [
        (one_q * attention.scale @ one_k.transpose(-1, -2)).softmax(-1).mean((0, 1), dtype=torch.float32)
        for one_q, one_k in zip(q, k, strict=True)
    ]
    return torch.stack(received)
