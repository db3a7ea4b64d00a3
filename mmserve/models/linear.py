"""A linear layer that can keep its weight in the blocked layout which the CPU's matrix library multiplies.

torch reorders a plain weight at every call with few rows, which halves the speed of decode. Knows
nothing about models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKED_FOR_ROWS = 2048  # the layout is chosen once; this one loses nothing with a single row


class Linear(nn.Linear):
    """`nn.Linear` that fuses the elementwise operation behind it where that is possible."""

    _packed: Tensor | None = None

    def pack(self) -> None:
        """Give up the plain weight for a packed copy; for inference on a CPU, after loading."""
        weight = self.weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        del self.weight
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return super().forward(x)
        return self._pointwise(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        """silu(Wx + b)"""
        if self._packed is None:
            return functional.silu(super().forward(x))
        return self._pointwise(x, "swish")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(Wx + b) * other"""
        if self._packed is None:
            return super().forward(x) * other
        return self._binary(x, other, "mul")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(Wx + b) + other"""
        if self._packed is None:
            return super().forward(x) + other
        return self._binary(x, other, "add")

    def _pointwise(self, x: Tensor, operation: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, operation, [], "")
        return out

    def _binary(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, operation)
        return out


def pack_linears(module: nn.Module) -> None:
    """Pack every `Linear` of a loaded module on the CPU, where this torch has the operations."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    packable = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packable.add(torch.bfloat16)
    for child in module.modules():
        if isinstance(child, Linear) and child.weight.device.type == "cpu" and child.weight.dtype in packable:
            child.pack()
