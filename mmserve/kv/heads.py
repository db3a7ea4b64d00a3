"""Small trained heads that score slots, read from safetensors.

Knows nothing about policies.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmserve.errors import BadRequest


class Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None


Heads = dict[int, tuple[Linear, ...]]  # by layer: one after another


@lru_cache(maxsize=2)
def read_heads(kv: str, file: str, pattern: str, device: torch.device) -> Heads:
    """The tensors whose names match: groups `layer`, `step` (may be missing) and `kind` (weight or bias)."""
    if not file:
        raise BadRequest(f"Expected kv_options.weights with kv {kv}: a file of trained heads")
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                if match := re.fullmatch(pattern, name):
                    layer, step = int(match["layer"]), int(match["step"] or 0)
                    value = tensors.get_tensor(name).to(device, torch.float32)
                    found.setdefault(layer, {}).setdefault(step, {})[match["kind"]] = value
    except (OSError, SafetensorError) as error:
        raise BadRequest("Expected trained heads in kv_options.weights, but they cannot be read") from error
    if not found:
        raise BadRequest(f"Expected trained heads of kv {kv} in kv_options.weights, but there are none")
    return {
        layer: tuple(Linear(steps[step]["weight"], steps[step].get("bias")) for step in sorted(steps))
        for layer, steps in found.items()
    }


def head_of(kv: str, heads: Heads, layer: int, inputs: int, outputs: int) -> tuple[Linear, ...]:
    """That of a layer, which must fit the model."""
    steps = heads.get(layer, ())
    if not steps or steps[0].weight.shape[1] != inputs or steps[-1].weight.shape[0] != outputs:
        raise BadRequest(
            f"Expected a head from {inputs} to {outputs} numbers for layer {layer} in kv_options.weights of "
            f"kv {kv}, but got none that fits"
        )
    return steps
