"""How sure a difference of accuracies is: standard errors over clusters, and a paired exact test.

Questions about the same clip are right or wrong together, so a clip is what was sampled, not a question
(Miller, arXiv 2411.00640, sections 2.2 and 4.2). Knows nothing about methods or suites.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of `values`, where those of one cluster may depend on each other.

    With one value per cluster it is the ordinary one; 0.0 for fewer than two clusters.
    """
    count = len(set(clusters))
    if count < 2:
        return 0.0
    mean = sum(values) / len(values)
    sums = _sums([value - mean for value in values], clusters)
    return math.sqrt(sum(total**2 for total in sums) * count / (count - 1)) / len(values)


def paired_p_value(ours: Sequence[bool], base: Sequence[bool], clusters: Sequence[Hashable]) -> float:
    """Two-sided p-value of "both are right equally often": an exact sign test over clusters that differ.

    With one question per cluster it is McNemar's exact test.
    """
    nets = _sums([float(a) - float(b) for a, b in zip(ours, base, strict=True)], clusters)
    better, worse = sum(net > 0 for net in nets), sum(net < 0 for net in nets)
    trials = better + worse
    # whole numbers: two to the power of a thousand questions is no float
    tail = 2 * sum(math.comb(trials, k) for k in range(min(better, worse) + 1))
    outcomes: int = 2**trials
    return min(1.0, tail / outcomes)


def _sums(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value
    return list(sums.values())
