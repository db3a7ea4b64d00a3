"""KVzap (arXiv 2601.07891): trained heads guess KVzip's scores from what comes into each layer.

One linear map or a small MLP per layer, from the normed hidden state to the logarithm of the score of every
KV head, as kvpress publishes them. With a `threshold` what scores below it leaves, and the budget is a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from mmserve.kv.allocation import Selection, whole_model, with_recent
from mmserve.kv.base import Budgeted, KVPolicy, LayerView, Rows
from mmserve.kv.heads import head_of, read_heads
from mmserve.kv.observers import RowScores
from mmserve.pruning.settings import number, setting, whole

NAMES = r"(?:layers|module_list)\.(?P<layer>\d+)\.(?:(?P<step>\d+)\.)?(?P<kind>weight|bias)"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVzap(KVPolicy):
    """The best slots of all layers and heads together."""

    name: ClassVar[str] = "kvzap"
    paper: ClassVar[str] = "arXiv:2601.07891"
    needs_all_layers: ClassVar[bool] = True
    count: ClassVar[Literal["bound"]] = "bound"
    trained_weights: ClassVar[bool] = True

    weights: str = setting("", "a safetensors file of heads")
    threshold: float | None = number(None, -1e3, 1e3, "the least score of what stays; null: none")
    window: int = whole(128, 0, 1 << 16, "slots at the end of the prompt that always stay")

    def observer(self) -> RowScores:
        return RowScores(self._score)

    def _score(self, rows: Rows) -> Tensor:
        keys, _ = rows.read()
        heads = read_heads(self.name, self.weights, NAMES, keys.device)
        steps = head_of(self.name, heads, rows.layer, rows.hidden.shape[1], len(keys))
        x = rows.hidden.float()
        for step in steps[:-1]:
            x = functional.gelu(functional.linear(x, step.weight, step.bias))
        return functional.linear(x, steps[-1].weight, steps[-1].bias).T

    def scores(self, view: LayerView) -> Tensor:
        slots = view.visual_slots
        recent = int((slots >= len(view.order) - self.window).sum())
        return with_recent(view.sums["scores"][:, slots], recent)

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        chosen = whole_model(scores, budget.slots)
        if self.threshold is None:
            return chosen
        least = self.threshold
        enough = [(layer >= least).cpu().numpy() for layer in scores]
        return [
            [head[mask[head]] for head, mask in zip(heads, masks, strict=True)]
            for heads, masks in zip(chosen, enough, strict=True)
        ]
