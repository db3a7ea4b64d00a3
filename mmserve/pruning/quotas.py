"""Share an exact number of tokens among groups in proportion to their sizes, in whole numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


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
