"""Key norm (arXiv 2406.11430): keys with a small norm receive much attention, so they stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.base import KVPolicy, LayerView


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyNorm(KVPolicy):
    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "arXiv:2406.11430"

    def scores(self, view: LayerView) -> Tensor:
        norms: Tensor = view.keys[:, view.visual].float().norm(dim=-1)
        return -norms
