"""What stays dense whatever the pattern: short prompts, the first layers, and the question.

Knows nothing about patterns, pages or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# slots so far from which on a pattern is quicker than dense attention, where nobody says otherwise: measured
# on a CPU, a guess on a GPU
DENSE_BELOW = {"cpu": 8192, "cuda": 16384}
# share of a chunk's pairs from which on a dense pass is quicker on a CPU, which packs keys once for all rows
DENSE_ABOVE = 0.85
MAX_DENSE_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Rules:
    """A chunk that ends before `dense_below` slots is dense, and so are the first `dense_layers`."""

    dense_below: int
    dense_layers: int

    @classmethod
    def of(cls, layers: int, device_type: str, dense_below: int | None = None) -> Rules:
        default = DENSE_BELOW.get(device_type, DENSE_BELOW["cpu"])
        return cls(default if dense_below is None else dense_below, min(MAX_DENSE_LAYERS, layers // 6))

    def sparse_rows(self, layer: int, is_visual: NDArray[np.bool_], rows: int, *, is_end: bool) -> int:
        """How many of the last `rows` slots, from their first on, a pattern takes; the others are dense.

        Text that ends a chunk is dense, since it may be the question. `is_visual` [S] are the slots so far;
        `is_end`: the last of them is the prompt's, which is what the answer is drawn from.
        """
        if layer < self.dense_layers or len(is_visual) < self.dense_below:
            return 0
        visual = np.flatnonzero(is_visual[-rows:])
        sparse = int(visual[-1]) + 1 if len(visual) else 0
        return min(sparse, rows - 1) if is_end else sparse
