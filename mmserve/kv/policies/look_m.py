"""LOOK-M (arXiv 2406.18139): text stays, visual slots that leave are merged into their most similar key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.kv.base import LayerView
from mmserve.kv.merging import averaged, most_similar, pivoted
from mmserve.kv.policies.h2o import H2O
from mmserve.pruning.settings import setting


def check_merging(name: str, value: object) -> None:
    if value not in ("pivot", "mean"):
        raise BadRequest(f"Expected {name} to be pivot or mean, but got {value!r:.40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LookM(H2O):
    """H2O's choice among visual slots; what leaves is drawn halfway to its pivot and averaged into it."""

    name: ClassVar[str] = "look_m"
    paper: ClassVar[str] = "arXiv:2406.18139"
    merges: ClassVar[bool] = True

    merging: str = setting("pivot", "pivot, or mean: averaged in as they are", check_merging)

    def merge(self, view: LayerView, head: int, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
        target = most_similar(view.keys[head], kept, evicted)
        merged = pivoted if self.merging == "pivot" else averaged
        return (
            merged(view.keys[head], kept, evicted, target),
            merged(view.values[head], kept, evicted, target),
        )
