"""A small prompt in several layers, as a policy would see it while it runs and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.kv.allocation import Selection
from mmserve.kv.base import Budgeted, KVPolicy, LayerView, Observer, Rows
from mmserve.models.rope import rope_angles, rope_frequencies, rotate

LAYERS, KV_HEADS, GROUP, WIDTH, HIDDEN = 3, 2, 3, 8, 12
FREQUENCIES = rope_frequencies(WIDTH, 1e4)


@dataclass(eq=False)
class Scene:
    """Text, visual slots and text; orders have gaps, as after encoder-side reduction."""

    visual: int = 17
    before: int = 3
    after: int = 5
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.before + self.visual + self.after

    @cached_property
    def order(self) -> NDArray[np.int32]:
        return np.arange(self.rows, dtype=np.int32) * 2 + 1

    @cached_property
    def is_visual(self) -> NDArray[np.bool_]:
        index = np.arange(self.rows)
        return (index >= self.before) & (index < self.before + self.visual)

    @cached_property
    def plain(self) -> list[tuple[Tensor, Tensor]]:
        """Queries [rows, q_heads, d] and keys [rows, kv_heads, d] of every layer before rotation."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            (
                torch.randn(self.rows, KV_HEADS * GROUP, WIDTH, generator=generator) * (layer + 0.5),
                torch.randn(self.rows, KV_HEADS, WIDTH, generator=generator),
            )
            for layer in range(LAYERS)
        ]

    @cached_property
    def rotated(self) -> list[tuple[Tensor, Tensor]]:
        angles = rope_angles(torch.from_numpy(self.order), FREQUENCIES, torch.float32)
        return [(rotate(queries, *angles), rotate(keys, *angles)) for queries, keys in self.plain]

    @cached_property
    def values(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [torch.randn(KV_HEADS, self.rows, WIDTH, generator=generator) for _ in range(LAYERS)]

    @cached_property
    def hidden(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 2)
        return [torch.randn(self.rows, HIDDEN, generator=generator) for _ in range(LAYERS)]

    def keys(self, layer: int) -> Tensor:
        return self.rotated[layer][1].transpose(0, 1)

    def show(self, observer: Observer | None, *, chunk: int = 1000) -> None:
        """Rows from the first visual one on, a chunk after another."""
        if observer is None:
            return
        for start in range(self.before, self.rows, chunk):
            stop = min(start + chunk, self.rows)
            for layer in range(LAYERS):
                observer.see(self._rows(layer, start, stop))

    def _rows(self, layer: int, start: int, stop: int) -> Rows:
        return Rows(
            layer=layer,
            queries=self.rotated[layer][0][start:stop],
            hidden=self.hidden[layer][start:stop],
            order=self.order[start:stop],
            position=self.order[start:stop],
            key_order=self.order[:stop],
            key_until=None,
            frequencies=FREQUENCIES,
            read=lambda: (self.keys(layer)[:, :stop], self.values[layer][:, :stop]),
        )

    def repeat(self, observer: Observer, *, chunk: int = 1000) -> None:
        """As a probe that repeats the visual rows: the same queries again, behind the prompt."""
        first, last = self.before, self.before + self.visual
        for start in range(first, last, chunk):
            stop = min(start + chunk, last)
            count = stop - start
            order = self.order[-1] + np.arange(1, 1 + count, dtype=np.int32)
            for layer in range(LAYERS):
                own = self.keys(layer)[:, start:stop] * 0.5
                keys = torch.cat([self.keys(layer), own], dim=1)
                observer.see(
                    Rows(
                        layer=layer,
                        queries=self.rotated[layer][0][start:stop],
                        hidden=self.hidden[layer][start:stop],
                        order=order,
                        position=order,
                        key_order=np.concatenate([self.order, order]),
                        key_until=None,
                        frequencies=FREQUENCIES,
                        read=lambda keys=keys: (keys, keys),  # type: ignore[misc]
                        repeats=self.order[start:stop],
                    )
                )

    def view(self, layer: int, observer: Observer | None = None) -> LayerView:
        order = torch.from_numpy(self.order)
        text = slice(self.before + self.visual, None)
        return LayerView(
            layer=layer,
            layers=LAYERS,
            queries=self.rotated[layer][0][text],
            query_order=order[text],
            keys=self.keys(layer),
            values=self.values[layer],
            visual=torch.from_numpy(self.is_visual),
            order=order,
            position=order,
            next_position=int(order[-1]) + 1,
            frequencies=FREQUENCIES,
            sums={} if observer is None else observer.sums(layer, order),
        )

    def views(self, policy: KVPolicy, *, chunk: int = 1000) -> list[LayerView]:
        observer, probe = policy.observer(), policy.probe()
        if observer is not None and probe is not None:
            self.repeat(observer, chunk=probe.rows)
        else:
            self.show(observer, chunk=chunk)
        return [self.view(layer, observer) for layer in range(LAYERS)]

    def chosen(self, policy: KVPolicy, slots: Sequence[int] | int, *, chunk: int = 1000) -> list[Selection]:
        """What a policy keeps of every layer, as indices of visual slots."""
        views = self.views(policy, chunk=chunk)
        counts = [slots] * LAYERS if isinstance(slots, int) else list(slots)
        scores = [policy.scores(view) for view in views]
        return policy.allocate(scores, Budgeted(counts, [policy.weight(view) for view in views]))

    def attention(self, layer: int, head: int, row: int) -> list[float]:
        """What a query head pays to every slot from row `row`, one number at a time."""
        queries, keys = self.rotated[layer]
        query = queries[row, head].double()
        logits = [float(query @ key.double()) / WIDTH**0.5 for key in keys[: row + 1, head // GROUP]]
        most = max(logits)
        weights = [np.exp(logit - most) for logit in logits]
        return [float(weight / sum(weights)) for weight in weights] + [0.0] * (self.rows - row - 1)
