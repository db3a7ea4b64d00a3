"""Made-up weights of Dynamic-LLaVA's predictor, by the names of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, BLOCKS, HEADS = 16, 2, 4


def predictor_weights(hidden: int, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"down_mlp.0.weight": (hidden,), "down_mlp.0.bias": (hidden,)}
    shapes |= {"down_mlp.1.weight": (WIDTH, hidden), "down_mlp.1.bias": (WIDTH,)}
    for at in range(BLOCKS):
        block = f"transformer.{at}"
        shapes |= {f"{block}.{name}": (WIDTH,) for name in ("norm1.weight", "norm1.bias")}
        shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"{block}.attn.proj.weight": (WIDTH, WIDTH), f"{block}.attn.proj.bias": (WIDTH,)}
        shapes |= {f"{block}.{name}": (WIDTH,) for name in ("norm2.weight", "norm2.bias")}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{block}.mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.fc2.bias": (WIDTH,)}
    for at, (wide, narrow) in {
        0: (WIDTH, WIDTH // 2),
        2: (WIDTH // 2, WIDTH // 4),
        4: (WIDTH // 4, 2),
    }.items():
        shapes |= {f"output_mlp.{at}.weight": (narrow, wide), f"output_mlp.{at}.bias": (narrow,)}
    return {name: torch.randn(shape, generator=rng) / 2 for name, shape in shapes.items()}


def write_predictor(file: Path, hidden: int, prefix: str = "model.image_score_predictor.") -> str:
    """A checkpoint with a predictor in it, beside other weights."""
    weights = {f"{prefix}{name}": value for name, value in predictor_weights(hidden).items()}
    save_file({**weights, "lm_head.weight": torch.zeros(2, 2)}, file)
    return str(file)
