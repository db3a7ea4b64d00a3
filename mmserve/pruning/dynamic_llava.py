"""Dynamic-LLaVA's image predictor (arXiv 2412.00876): a small trained network rates the visual tokens.

It reads hidden states at the input of an early layer and knows nothing of the question. Its weights come from
a file, by the names of the published checkpoints: a pre-norm transformer between two MLPs, half of whose
features are replaced by their mean over the tokens. Unlike the published code, which knows one image, each
item is rated by itself. The predictors of the paper for text, generated or not, are not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors, at_layer, keep_top
from mmserve.pruning.settings import setting, share_kept, whole

_LAYER = 2
_PREFIX = "image_score_predictor."  # of the names in a checkpoint, behind "model." or nothing
_FIRST = ("down_mlp.0.weight", "down_mlp.0.bias", "down_mlp.1.weight", "down_mlp.1.bias")
_ATTENTION = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias")
_MLP = ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
_BLOCK = (*_ATTENTION, *_MLP)
_LAST = tuple(f"output_mlp.{at}.{kind}" for at in (0, 2, 4) for kind in ("weight", "bias"))


class Predictor:
    """The network, in fp32. Its file may be a whole checkpoint; only the predictor is read from it."""

    def __init__(self, file: str) -> None:
        try:
            with safe_open(file, framework="pt") as found:
                names = {name.partition(_PREFIX)[2] or name: name for name in found.keys()}  # noqa: SIM118
                self._blocks = sum(name.endswith(".norm1.weight") for name in names)
                blocks = [f"transformer.{at}.{name}" for at in range(self._blocks) for name in _BLOCK]
                self._weights = {
                    name: found.get_tensor(names[name]).float() for name in (*_FIRST, *blocks, *_LAST)
                }
        except (OSError, SafetensorError) as error:
            raise BadRequest(
                f"Expected weights to be a safetensors file with a predictor, but got {file!r}"
            ) from error
        except KeyError as error:
            raise BadRequest(f"Expected {error.args[0]} of a predictor in {file}, but it lacks it") from error

    @property
    def width(self) -> int:
        """Of the hidden states that it rates."""
        return len(self._weights["down_mlp.0.weight"])

    def rate(self, tokens: Tensor, heads: int) -> Tensor:
        """How likely each of `tokens` [N, D] of an item is to be kept, fp32 [N], in logarithms."""
        if tokens.shape[1] != self.width:
            raise BadRequest(
                f"Expected weights for hidden states of {tokens.shape[1]}, but got some for {self.width}"
            )
        x = self._norm(tokens.float(), "down_mlp.0")
        x = F.gelu(self._linear(x, "down_mlp.1"))
        if x.shape[1] % heads:
            raise BadRequest(f"Expected heads that divide {x.shape[1]}, but got {heads}")
        for at in range(self._blocks):
            block = f"transformer.{at}"
            x = x + self._attention(self._norm(x, f"{block}.norm1"), f"{block}.attn", heads)
            inner = self._linear(self._norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            x = x + self._linear(F.gelu(inner), f"{block}.mlp.fc2")
        local, common = x.chunk(2, dim=1)
        x = torch.cat([local, common.mean(0, keepdim=True).expand(len(x), -1)], 1)
        for name in ("output_mlp.0", "output_mlp.2"):
            x = F.gelu(self._linear(x, name))
        return self._linear(x, "output_mlp.4").log_softmax(1)[:, 0]

    def _attention(self, x: Tensor, name: str, heads: int) -> Tensor:
        q, k, v = self._linear(x, f"{name}.qkv").unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self._linear(attended.transpose(0, 1).flatten(1), f"{name}.proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self._on(x, f"{name}.bias") if f"{name}.bias" in self._weights else None
        product: Tensor = F.linear(x, self._on(x, f"{name}.weight"), bias)
        return product

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self._on(x, f"{name}.{kind}") for kind in ("weight", "bias"))
        normed: Tensor = F.layer_norm(x, x.shape[1:], weight, bias)
        return normed

    def _on(self, x: Tensor, name: str) -> Tensor:
        """The weights of this name, where `x` is."""
        found: Tensor = self._weights[name]
        if found.device != x.device:
            found = self._weights[name] = found.to(x.device)
        return found


@lru_cache(maxsize=4)
def load_predictor(file: str) -> Predictor:
    """Read once per process: who changes the file starts anew."""
    return Predictor(file)


def _check_weights(name: str, value: object) -> None:
    if not isinstance(value, str) or not Path(value).is_file():
        raise BadRequest(f"Expected {name} to be the safetensors file of a predictor, but got {value!r}")
    load_predictor(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicLlava(InnerMethod):
    """Keep the share `keep` that the predictor rates highest."""

    name: ClassVar[str] = "dynamic_llava"
    paper: ClassVar[str] = "arXiv:2412.00876"
    needs_query: ClassVar[bool] = False
    acts_at: ClassVar[str] = "layer 2"
    trained_weights: ClassVar[bool] = True

    keep: float = share_kept(0.2)
    weights: str = setting("", "safetensors file of the trained predictor; has to be given", _check_weights)
    heads: int = whole(8, 1, 1024, "of the attention in the predictor")
    layer: int | None = whole(
        None, 1, 1024, "at whose input it acts; none: 2, or the last one of a shallower model"
    )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return at_layer(self.name, self.layer, _LAYER, num_layers)

    def reduce(self, view: InnerView) -> Survivors:
        predictor = load_predictor(self.weights)
        scores = torch.zeros(len(view.hidden), device=view.hidden.device)
        for item in items(view.is_reducible):
            scores[item] = predictor.rate(view.hidden[item], self.heads)
        rows = keep_top(view, scores, exact_count(self.keep, view.entered))
        return Survivors(rows, view.hidden[rows])


def items(is_reducible: Tensor) -> tuple[Tensor, ...]:
    """Rows of each item: what ends one is not reducible."""
    rows = is_reducible.nonzero().flatten()
    ends = (rows.diff() > 1).nonzero().flatten() + 1
    return rows.tensor_split(ends.cpu())
