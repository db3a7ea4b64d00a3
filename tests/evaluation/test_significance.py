"""Standard errors and paired tests against brute force and values computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mmserve.evaluation.significance import clustered_stderr, paired_p_value


def test_one_value_per_cluster_is_the_ordinary_standard_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    expected = float(np.std(values, ddof=1)) / math.sqrt(5)
    assert clustered_stderr(values, range(5)) == pytest.approx(expected)


def test_questions_that_stand_and_fall_together_count_once() -> None:
    values = [1.0, 0.0, 1.0, 0.0]
    tripled = [value for value in values for _ in range(3)]
    clusters = [index for index in range(4) for _ in range(3)]
    assert clustered_stderr(tripled, clusters) == pytest.approx(clustered_stderr(values, range(4)))
    assert clustered_stderr(tripled, range(12)) < clustered_stderr(tripled, clusters)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 0.0]])
def test_a_single_cluster_says_nothing(values: list[float]) -> None:
    assert clustered_stderr(values, ["a"] * len(values)) == 0.0


def by_brute_force(nets: list[int]) -> float:
    """Share of sign flips whose count of positives is at least as far from the middle."""
    signs = [net for net in nets if net]
    observed = abs(sum(net > 0 for net in signs) - len(signs) / 2)
    flips = list(itertools.product([False, True], repeat=len(signs)))
    return sum(abs(sum(flip) - len(signs) / 2) >= observed for flip in flips) / len(flips)


@pytest.mark.parametrize("seed", range(8))
def test_the_p_value_is_that_of_all_sign_flips(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, base = (rng.random((2, 11)) < 0.6).tolist()
    nets = [int(a) - int(b) for a, b in zip(ours, base, strict=True)]
    assert paired_p_value(ours, base, range(11)) == pytest.approx(by_brute_force(nets))


def test_known_p_values() -> None:
    base = [True] * 10
    assert paired_p_value(base, base, range(10)) == 1.0
    assert paired_p_value([False] * 10, base, range(10)) == 2 / 2**10
    # within a cluster gains and losses cancel
    assert paired_p_value([True, False], [False, True], ["a", "a"]) == 1.0


def test_a_large_suite_is_no_overflow() -> None:
    ours, base = [True] * 3000, [False] * 3000
    assert paired_p_value(ours, base, range(3000)) == 0.0
