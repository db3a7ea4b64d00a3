"""sample: greedy, truncation, seeds that do not depend on anything else, log-probabilities and ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.engine.sampler import sample
from mmserve.sampling import SamplingParams

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(torch.tensor)


def scores(size: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def draws(logits: Tensor, params: SamplingParams, count: int = 400) -> Counter[int]:
    return Counter(sample(logits, params, step)[0] for step in range(count))


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = scores()
    token, logprobs = sample(logits, SamplingParams(), 0)
    assert token == int(logits.argmax())
    assert logprobs is None


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.integers(1, 10), st.integers(0, 2**62), st.floats(0.1, 3))
def test_top_k_draws_one_of_the_k_most_likely(logits: Tensor, k: int, seed: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=k, seed=seed)
    token, _ = sample(logits, params, 3)
    assert int((logits > logits[token]).sum()) < k


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.floats(0.01, 0.999), st.integers(0, 2**62))
def test_top_p_draws_from_the_smallest_sufficient_set(logits: Tensor, p: float, seed: int) -> None:
    token, _ = sample(logits, SamplingParams(temperature=1, top_p=p, seed=seed), 0)
    mass = logits.softmax(-1)
    # what is more likely does not reach p without this token
    assert float(mass[mass > mass[token]].sum()) < p + 1e-5


def test_top_p_and_top_k_of_one_are_greedy() -> None:
    logits = scores()
    for params in (
        SamplingParams(temperature=2, top_k=1, seed=1),
        SamplingParams(temperature=2, top_p=1e-6, seed=1),
    ):
        assert set(draws(logits, params, 30)) == {int(logits.argmax())}


def test_a_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    logits = torch.zeros(5)
    assert set(draws(logits, SamplingParams(temperature=1, top_k=10**6, seed=4))) == set(range(5))


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    counts = draws(logits, SamplingParams(temperature=1, seed=5), 4000)
    assert [counts[i] / 4000 for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)
    squared = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30
    counts = draws(logits, SamplingParams(temperature=0.5, seed=5), 4000)
    assert [counts[i] / 4000 for i in range(4)] == pytest.approx(squared.tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e-6])
def test_a_tiny_temperature_is_greedy_and_never_overflows(temperature: float) -> None:
    logits = scores()
    params = SamplingParams(temperature=temperature, seed=1)
    assert set(draws(logits, params, 10)) == {int(logits.argmax())}


def test_a_draw_depends_on_seed_and_step_only() -> None:
    logits = scores(1000)
    params = SamplingParams(temperature=1, seed=7)
    alone = [sample(logits, params, step)[0] for step in range(20)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    # other requests in between, in another order, with rows of a batch
    batch = torch.stack([scores(1000, 1), logits, scores(1000, 2)])
    mixed = {}
    for step in reversed(range(20)):
        sample(batch[0], SamplingParams(temperature=1, seed=step), step)
        mixed[step] = sample(batch[1], params, step)[0]
    assert [mixed[step] for step in range(20)] == alone
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert len(set(alone)) > 5, "steps draw alike"
    other = [sample(logits, SamplingParams(temperature=1, seed=8), step)[0] for step in range(20)]
    assert other != alone


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.integers(0, 20), st.sampled_from([0.0, 1.5]), st.integers(0, 1000))
def test_log_probabilities_are_the_models_own(
    logits: Tensor, count: int, temperature: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=3 if temperature else 0, seed=seed, logprobs=count)
    token, found = sample(logits, params, 0)
    assert found is not None
    assert token in found
    wanted = logits.log_softmax(-1)
    assert count - 1 < len(found) <= count + 1 or len(found) == len(logits)
    for index, entry in found.items():
        assert entry.logprob == pytest.approx(float(wanted[index]), abs=1e-5)
        better, alike = int((wanted > wanted[index]).sum()), int((wanted == wanted[index]).sum())
        assert better < entry.rank <= better + alike
    # nothing better is left out
    best = sorted((entry.logprob for entry in found.values()), reverse=True)[:count]
    assert best == pytest.approx(wanted.sort(descending=True).values[: len(best)].tolist(), abs=1e-5)
