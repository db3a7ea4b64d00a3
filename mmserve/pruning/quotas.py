"""Share an exact number of tokens among groups in proportion to their sizes, in whole numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def exact_quotas(sizes: Ints, segment: Ints, budget: int) -> Ints:
    """Quotas that sum to `budget`, none above its group's size, at least one token in every segment.

    Each group gets the floor of its proportional share; a segment left with nothing gets one token in
    its largest group; the rest goes by largest fraction. Ties go to the lower index. `segment` of the
    groups is ascending, and no segment holds more groups' tokens than fits its frames, so that
    `budget` between the number of segments and the sum of sizes always works out.
    """
    total = int(sizes.sum())
    assert len(np.unique(segment)) <= budget <= total
    quotas, fraction = np.divmod(sizes * budget, total)
    order = np.lexsort((-fraction, segment))
    segments, first = np.unique(segment[order], return_index=True)
    starved = np.bincount(segment, weights=quotas)[segments] == 0
    granted = order[first][starved]
    quotas[granted] += 1
    fraction[granted] = -1
    rest = budget - int(quotas.sum())
    assert 0 <= rest <= int((fraction > 0).sum())
    quotas[np.argsort(-fraction, kind="stable")[:rest]] += 1
    return quotas


def even_quotas(groups: int, budget: int) -> Ints:
    """Quotas that sum to `budget` and differ by one at most, the larger ones spread evenly."""
    return np.diff((2 * np.arange(groups + 1) * budget + groups) // (2 * groups))


def weighted_quotas(weights: Floats, size: int, budget: int) -> Ints:
    """Quotas in proportion to `weights`, which are above 0, none above `size`, that sum to `budget` exactly.

    What a full group cannot take goes to the others in proportion; remainders go by largest fraction,
    then lower index.
    """
    assert 0 <= budget <= size * len(weights)
    shares = np.zeros(len(weights))
    is_full = np.zeros(len(weights), dtype=np.bool_)
    while True:
        rest = np.where(is_full, 0.0, weights)
        shares = np.where(is_full, size, (budget - size * is_full.sum()) * rest / (rest.sum() or 1.0))
        if not (over := (shares > size) & ~is_full).any():
            break
        is_full |= over
    quotas = np.floor(shares).astype(np.int64)
    fraction = np.where(quotas < size, shares - quotas, -1)
    quotas[np.argsort(-fraction, kind="stable")[: budget - int(quotas.sum())]] += 1
    return quotas
