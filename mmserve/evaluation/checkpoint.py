"""Training state on disk: parameters, AdamW moments and the step in one safetensors file.

Written under another name and renamed, so a killed run never leaves half a file.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None, step: int) -> None:
    """`named_parameters` lists tied weights once, which is what safetensors wants."""
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.named_parameters()}
    for index, parameter in enumerate(_parameters(optimiser)):
        assert optimiser is not None
        for moment, value in optimiser.state[parameter].items():
            tensors[f"optimiser.{index}.{moment}"] = torch.as_tensor(value).contiguous()
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata={"step": str(step)})
    os.replace(unfinished, path)


@torch.no_grad()
def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None) -> int:
    """Restore what `save_state` wrote; returns the step."""
    with safe_open(path, "pt") as file:
        for name, value in model.named_parameters():
            value.copy_(file.get_tensor(f"model.{name}"))
        known = set(file.keys())
        for index, parameter in enumerate(_parameters(optimiser)):
            assert optimiser is not None
            names = {moment: f"optimiser.{index}.{moment}" for moment in _MOMENTS}
            if names["step"] in known:
                state: dict[str, Tensor] = {
                    moment: file.get_tensor(name).to(parameter.device if moment != "step" else "cpu")
                    for moment, name in names.items()
                }
                optimiser.state[parameter] = state
        return int(file.metadata()["step"])


def _parameters(optimiser: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    if optimiser is None:
        return []
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
