"""sample and prompt_logprobs against a naive float64 oracle; draws that depend on (seed, step) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmserve.engine.sampler import Row, prompt_logprobs, sample
from mmserve.sampling import Logprob, SamplingParams

Floats = npt.NDArray[np.float64]
VOCABULARY = 24
EOS = (1, 2)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
# different and exact in fp32, so that rounding never decides an order
LOGITS = st.permutations([(token - 9) / 4 for token in range(VOCABULARY)]).map(torch.tensor)


def row(params: SamplingParams, step: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> Row:
    return Row(params, step, prompt, output, EOS)


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def naive_logits(logits: Tensor, row: Row) -> Floats:
    """Bias, minimum length and penalties, one token after another."""
    params = row.params
    changed: Floats = logits.numpy().astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        if token < len(changed):
            changed[token] += bias
    if len(row.output) < params.min_tokens:
        for token in (*row.eos, *params.stop_token_ids):
            changed[token] = -np.inf
    for token in range(len(changed)):
        if token in row.prompt or token in row.output:
            factor = params.repetition_penalty
            changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        count = list(row.output).count(token)
        changed[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return changed


def naive_shares(logits: Tensor, row: Row, slack: float = 0.0) -> Floats:
    """The distribution drawn from. `slack` widens what is kept, where rounding may decide."""
    params = row.params
    changed = naive_logits(logits, row) / params.temperature
    changed[softmax(changed) < params.min_p * softmax(changed).max() * (1 - slack)] = -np.inf
    if params.top_k:
        changed[changed < np.sort(changed)[-min(params.top_k, len(changed))]] = -np.inf
    order = np.argsort(-changed, kind="stable")
    shares = softmax(changed)[order]
    before = np.cumsum(shares) - shares
    kept = order[(before < params.top_p + slack) | (params.top_p == 1)]
    result = np.zeros(len(changed))
    result[kept] = softmax(changed)[kept]
    return np.asarray(result / result.sum())


ADJUSTMENTS = {
    "logit_bias": st.none() | st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100)),
    "min_tokens": st.integers(0, 8),
    "stop_token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
    "repetition_penalty": st.just(1.0) | st.floats(0.5, 2),
    "presence_penalty": st.just(0.0) | st.floats(-2, 2),
    "frequency_penalty": st.just(0.0) | st.floats(-2, 2),
}
TRUNCATIONS = {
    "temperature": st.floats(0.2, 3),
    "top_k": st.just(0) | st.integers(1, 30),
    "top_p": st.just(1.0) | st.floats(0.01, 1),
    "min_p": st.just(0.0) | st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
}


@settings(max_examples=80, deadline=None)
@given(LOGITS, TOKENS, TOKENS, st.fixed_dictionaries({}, optional=ADJUSTMENTS))
def test_greedy_takes_the_best_after_bias_minimum_length_and_penalties(
    logits: Tensor, prompt: list[int], output: list[int], given_params: dict[str, Any]
) -> None:
    asked = row(SamplingParams(**given_params), len(output), prompt, output)
    ((token, _),) = sample(logits[None], [asked])
    wanted = naive_logits(logits, asked)
    assert wanted[token] >= wanted.max() - 1e-4


@settings(max_examples=120, deadline=None)
@given(
    LOGITS,
    TOKENS,
    TOKENS,
    st.fixed_dictionaries(TRUNCATIONS, optional=ADJUSTMENTS),
    st.integers(0, 10_000),
)
def test_a_draw_is_of_what_the_parameters_leave(
    logits: Tensor, prompt: list[int], output: list[int], given_params: dict[str, Any], step: int
) -> None:
    asked = row(SamplingParams(**given_params), step, prompt, output)
    ((token, _),) = sample(logits[None], [asked])
    assert naive_shares(logits, asked, slack=1e-4)[token] > 0


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
        {"logit_bias": {3: 2.0, 7: -100, 10**6: 5}, "top_p": 0.9},
        {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"min_tokens": 9, "stop_token_ids": (5,), "logit_bias": {1: 100}},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params: dict[str, Any]) -> None:
    count, logits = 1500, scores(10, seed=4)
    asked = SamplingParams(**{"temperature": 1.0, "seed": 11} | params)
    rows = [row(asked, step, (0, 8, 8, 10**6), (3, 3, 9)) for step in range(count)]
    drawn = [token for token, _ in sample(logits.expand(count, -1), rows)]
    shares = naive_shares(logits, rows[0])
    found = np.bincount(drawn, minlength=10) / count
    assert np.all(found[shares == 0] == 0)
    # within 4.5 standard deviations
    assert np.all(np.abs(found - shares) <= 4.5 * np.sqrt(shares * (1 - shares) / count))


def test_a_draw_depends_on_seed_and_step_only() -> None:
    logits = scores(1000)
    params = SamplingParams(temperature=1, seed=7, top_p=0.95)
    state = torch.get_rng_state()
    alone = [sample(logits[None], [row(params, step)])[0][0] for step in range(20)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert len(set(alone)) > 5, "steps draw alike"
    other = SamplingParams(temperature=1, seed=8, top_p=0.95)
    assert [sample(logits[None], [row(other, step)])[0][0] for step in range(20)] != alone


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.fixed_dictionaries({}, optional=TRUNCATIONS | ADJUSTMENTS | {"logprobs": st.integers(0, 5)}),
            st.integers(0, 1000),
            TOKENS,
            TOKENS,
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 100),
)
def test_rows_do_not_see_each_other(
    asked: list[tuple[dict[str, Any], int, list[int], list[int]]], seed: int
) -> None:
    rows = [
        row(SamplingParams(**{"seed": 1} | params), step, prompt, output)
        for params, step, prompt, output in asked
    ]
    logits = scores(len(rows), VOCABULARY, seed=seed)
    before = logits.clone()
    together = sample(logits, rows)
    assert torch.equal(logits, before), "the model's logits were changed"
    for place, alone in enumerate(rows):
        ((token, found),) = sample(logits[place : place + 1], [alone])
        assert together[place][0] == token
        assert together[place][1] == found


class Calls(TorchFunctionMode):
    """Names every operation on tensors, the waits for a device among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401  # torch's signature
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


WAITS = {"tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"}


@pytest.mark.parametrize("size", [1, 64])
def test_plain_greedy_rows_are_one_operation_and_one_wait(size: int) -> None:
    logits = scores(size, VOCABULARY)
    with Calls() as calls:
        found = sample(logits, [row(SamplingParams(top_k=5, min_p=0.5))] * size)
    assert found == [(int(each.argmax()), None) for each in logits]
    assert [name for name in calls.names if name != "__len__"] == ["argmax", "tolist"]


def test_other_rows_wait_no_more() -> None:
    wild = SamplingParams(
        temperature=1, seed=1, top_k=9, min_p=0.1, min_tokens=5, repetition_penalty=1.1, presence_penalty=1
    )
    with Calls() as calls:
        sample(scores(8, VOCABULARY), [row(wild)] * 8)
    assert [name for name in calls.names if name in WAITS] == ["tolist"]


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e-6, 1e-5, 1e-3])
def test_a_tiny_temperature_is_greedy_and_never_overflows(temperature: float) -> None:
    logits = scores(10, VOCABULARY) * 1e4
    params = SamplingParams(temperature=temperature, seed=1)
    found = sample(logits, [row(params, step) for step in range(10)])
    assert [token for token, _ in found] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_truncation_is_greedy(params: dict[str, Any]) -> None:
    logits = scores(30, VOCABULARY)
    found = sample(
        logits,
        [row(SamplingParams(temperature=3, seed=1, **params), step) for step in range(30)],
    )
    assert [token for token, _ in found] == logits.argmax(-1).tolist()


def test_equal_logits_can_all_be_drawn_and_top_p_halves_them() -> None:
    logits = torch.zeros(300, 4)
    for top_p, kept in ((1.0, 4), (0.5, 2), (1e-6, 1)):
        params = SamplingParams(temperature=1, seed=3, top_p=top_p, top_k=10**6)
        drawn = sample(logits, [row(params, step) for step in range(300)])
        assert len({token for token, _ in drawn}) == kept


def test_min_tokens_holds_until_enough_are_out() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 7.0, 1.0]])
    for ignore_eos in (False, True):
        params = SamplingParams(min_tokens=2, stop_token_ids=(3, 10**6), ignore_eos=ignore_eos)
        found = [sample(logits, [row(params, n, (), (0,) * n)])[0][0] for n in range(4)]
        assert found == [4, 4, 1, 1]


def test_a_broken_row_leaves_the_others_alone() -> None:
    logits = scores(3, VOCABULARY)
    good = logits[2].argmax()
    logits[0] = torch.nan
    logits[1] = -torch.inf
    wild = SamplingParams(temperature=1, seed=1, top_p=0.9, top_k=4, min_p=0.1)
    found = sample(logits, [row(wild), row(wild), row(SamplingParams())])
    assert found[2] == (int(good), None)
    assert all(0 <= token < VOCABULARY for token, _ in found)


def check_report(logits: Tensor, token: int, found: dict[int, Logprob], count: int) -> None:
    """As vLLM: the token first, then the best by place; a token that is not among them by its rank."""
    wanted = np.log(softmax(logits.numpy().astype(np.float64)))
    best = np.sort(wanted)[::-1][:count]
    assert next(iter(found)) == token
    by_place = sorted((entry.rank, entry.logprob) for entry in found.values())[: len(best)]
    assert [rank for rank, _ in by_place] == list(range(1, len(best) + 1)) or not count
    assert [logprob for _, logprob in by_place][: len(best)] == pytest.approx(best.tolist(), abs=1e-5)
    assert len(best) <= len(found) <= len(best) + 1
    for index, entry in found.items():
        assert entry.logprob == pytest.approx(wanted[index], abs=1e-5)
    if len(found) > len(best):
        assert found[token].rank == int((logits >= logits[token]).sum())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.5, 0.0, 0.5, 2.0, 4.0]), min_size=2, max_size=30).map(torch.tensor),
    st.integers(0, 20),
    st.sampled_from([0.0, 1.5]),
    st.integers(0, 1000),
)
def test_log_probabilities_are_the_models_own(
    logits: Tensor, count: int, temperature: float, step: int
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=3 if temperature else 0,
        seed=5,
        logprobs=count,
        logit_bias={1: -5.0},
        repetition_penalty=1.3,
    )
    ((token, found),) = sample(logits[None], [row(params, step, (0,))])
    assert found is not None
    check_report(logits, token, found, count)


def test_rows_report_as_many_alternatives_as_each_asked_for() -> None:
    logits = scores(4, VOCABULARY)
    counts = [None, 0, 5, 20]
    found = sample(logits, [row(SamplingParams(logprobs=count)) for count in counts])
    assert [report and len(report) for _, report in found] == [None, 1, 5, 20]


@pytest.mark.parametrize("count", [0, 1, 20, 100])
def test_prompt_logprobs_are_of_the_targets(count: int) -> None:
    logits, targets = scores(7, VOCABULARY, seed=2), torch.arange(7) * 3
    found = prompt_logprobs(logits, targets, count)
    assert len(found) == 7
    for scored, target, report in zip(logits, targets.tolist(), found, strict=True):
        check_report(scored, target, report, count)


def test_prompt_logprobs_of_nothing_are_none() -> None:
    assert prompt_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 3) == []
