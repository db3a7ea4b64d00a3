"""What every registered reducer promises: count, order, determinism, protected tokens, checked settings."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.pruning.base import (
    PRUNERS,
    Pruner,
    VisualItem,
    exact_count,
    load_pruner,
    make_pruner,
    window_frames,
    windows,
)

# a method that acts later as well adds to the prompt what it needs there
NAMES = [name for name in sorted(PRUNERS) if make_pruner(name, 1.0).acts_at == "encoder"]
every_pruner = pytest.mark.parametrize("name", NAMES)

BOUNDED = {"prumerge"}  # the count depends on content
WHOLE_FRAME = {"dycoke", "evs"}  # one frame of each window stays whole


def counts(pruner: Pruner, frames: int, tokens: int) -> list[int]:
    """The most that each window may keep."""
    sizes = [(stop - start) * tokens for start, stop in windows(frames, window_frames(pruner))]
    if pruner.name == "none":
        return sizes
    least = tokens if pruner.name in WHOLE_FRAME else 1
    return [max(least, exact_count(pruner.keep, size)) for size in sizes]


def make_item(seed: int, frames: int, tokens: int, protect: Tensor | None = None) -> VisualItem:
    rng = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, tokens, 8, generator=rng)
    embeddings = scene + 0.4 * torch.randn(frames, tokens, 8, generator=rng)
    return VisualItem(
        embeddings=embeddings, saliency=torch.rand(frames, tokens, generator=rng), protect=protect
    )


@every_pruner
@given(frames=st.integers(1, 20), tokens=st.integers(1, 25), keep=st.floats(1e-4, 1), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_output_is_planned_ordered_and_in_range(
    name: str, frames: int, tokens: int, keep: float, seed: int
) -> None:
    pruner = make_pruner(name, keep)
    item = make_item(seed, frames, tokens)
    reduced = pruner.reduce(item)
    assert pruner.plan(frames, tokens) == sum(counts(pruner, frames, tokens))
    count = len(reduced.source)
    assert count == pruner.plan(frames, tokens) or name in BOUNDED
    assert 1 <= count <= pruner.plan(frames, tokens)
    assert reduced.embeddings.shape == (count, 8)
    assert reduced.source.shape == reduced.weight.shape == (count,)
    assert reduced.source.dtype == torch.int64
    assert reduced.weight.dtype == torch.float32
    assert bool((reduced.source.diff() > 0).all())
    assert int(reduced.source[0]) >= 0
    assert int(reduced.source[-1]) < frames * tokens
    assert bool((reduced.weight >= 1).all())
    assert float(reduced.weight.sum()) <= frames * tokens * (1 + 1e-6)
    alone = reduced.weight == 1
    assert torch.equal(reduced.embeddings[alone], item.embeddings.flatten(0, 1)[reduced.source[alone]])


@every_pruner
def test_two_runs_give_the_same_bits(name: str) -> None:
    first, second = (make_pruner(name, 0.3).reduce(make_item(1, 10, 20)) for _ in range(2))
    assert torch.equal(first.embeddings, second.embeddings)
    assert torch.equal(first.source, second.source)
    assert torch.equal(first.weight, second.weight)


@every_pruner
def test_what_was_reduced_before_changes_no_bit(name: str) -> None:
    items = [make_item(*shape) for shape in ((1, 10, 20), (2, 1, 31), (3, 17, 6))]
    pruner = make_pruner(name, 0.3)
    for item, among_others in [(item, pruner.reduce(item)) for item in [*items, *reversed(items)]]:
        alone = make_pruner(name, 0.3).reduce(item)
        assert torch.equal(among_others.embeddings, alone.embeddings)
        assert torch.equal(among_others.source, alone.source)


@every_pruner
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_protected_tokens_survive_on_top_of_the_plan(name: str, keep: float) -> None:
    marks = torch.zeros(6, 15, dtype=torch.bool)
    marks[:, 4::5] = True
    item = make_item(2, 6, 15, marks)
    pruner = make_pruner(name, keep)
    reduced = pruner.reduce(item)
    protected = torch.nonzero(marks.flatten()).flatten()
    open_item = VisualItem(embeddings=item.embeddings[:, ~marks[0]], saliency=item.saliency[:, ~marks[0]])
    assert len(reduced.source) == len(pruner.reduce(open_item).source) + 18
    assert bool(torch.isin(protected, reduced.source).all())
    kept = torch.isin(reduced.source, protected)
    assert torch.equal(reduced.embeddings[kept], item.embeddings.flatten(0, 1)[protected])
    assert bool((reduced.weight[kept] == 1).all())
    assert bool((reduced.source.diff() > 0).all())
    if name != "none":
        assert torch.equal(reduced.embeddings[~kept], pruner.reduce(open_item).embeddings)


@every_pruner
def test_keeping_all_is_the_identity(name: str) -> None:
    item = make_item(4, 9, 10)
    reduced = make_pruner(name, 1.0).reduce(item)
    assert torch.equal(reduced.embeddings, item.embeddings.flatten(0, 1))
    assert torch.equal(reduced.source, torch.arange(90))
    assert bool((reduced.weight == 1).all())


@every_pruner
@pytest.mark.parametrize("keep", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_features_stay_constant(name: str, keep: float, dtype: torch.dtype) -> None:
    constant = torch.randn(16, generator=torch.Generator().manual_seed(6)).to(dtype)
    item = VisualItem(embeddings=constant.expand(12, 15, 16), saliency=make_item(6, 12, 15).saliency)
    reduced = make_pruner(name, keep).reduce(item)
    assert reduced.embeddings.dtype == dtype
    torch.testing.assert_close(reduced.embeddings, constant.expand(len(reduced.source), 16))


@every_pruner
@pytest.mark.parametrize("keep", [0.1, 0.5])
@pytest.mark.parametrize("frames", [1, 12])
def test_nothing_to_tell_tokens_apart_by_is_no_trouble(name: str, keep: float, frames: int) -> None:
    item = VisualItem(embeddings=torch.zeros(frames, 15, 8), saliency=torch.zeros(frames, 15))
    reduced = make_pruner(name, keep).reduce(item)
    assert bool((reduced.embeddings == 0).all())
    assert bool((reduced.source.diff() > 0).all())


@every_pruner
def test_identical_frames_stay_what_they_are(name: str) -> None:
    frame = make_item(7, 1, 15)
    item = VisualItem(embeddings=frame.embeddings.expand(12, -1, -1), saliency=frame.saliency.expand(12, -1))
    reduced = make_pruner(name, 0.25).reduce(item)
    alone = reduced.weight == 1
    assert bool(reduced.embeddings.isfinite().all())
    assert torch.equal(reduced.embeddings[alone], item.embeddings.flatten(0, 1)[reduced.source[alone]])


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "window_frames" in load_pruner(name).__dataclass_fields__]
)
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_windows_know_nothing_of_each_other(name: str, keep: float) -> None:
    item = make_item(8, 19, 12)
    whole = make_pruner(name, keep, window_frames=8).reduce(item)
    parts = [
        make_pruner(name, keep, window_frames=0).reduce(
            VisualItem(embeddings=item.embeddings[start:stop], saliency=item.saliency[start:stop])
        )
        for start, stop in ((0, 8), (8, 16), (16, 19))
    ]
    assert torch.equal(whole.embeddings, torch.cat([part.embeddings for part in parts]))
    assert whole.source.tolist() == [
        source + start * 12
        for part, start in zip(parts, (0, 8, 16), strict=True)
        for source in part.source.tolist()
    ]
    assert torch.equal(whole.weight, torch.cat([part.weight for part in parts]))


@every_pruner
def test_an_item_of_protected_tokens_only_comes_back_whole(name: str) -> None:
    item = make_item(3, 2, 3, torch.ones(2, 3, dtype=torch.bool))
    assert make_pruner(name, 0.1).reduce(item).source.tolist() == list(range(6))


@every_pruner
def test_method_is_a_frozen_dataclass_that_declares_itself(name: str) -> None:
    method = load_pruner(name)
    assert method.name == name
    assert dataclasses.fields(method)[0].name == "keep"
    assert method.count == ("bound" if name in BOUNDED else "exact")
    assert not method.needs_query
    assert not method.trained_weights
    assert set(method.modalities) == {"image", "video"}
    assert method.needs_whole_item == (name != "none")
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_pruner(name, 0.5).keep = 1.0  # type: ignore[misc]  # assigning is what must fail


@every_pruner
@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan"), float("inf"), True])
def test_keep_out_of_range_is_refused(name: str, keep: float) -> None:
    with pytest.raises(BadRequest, match="Expected keep above 0 to 1, but got"):
        make_pruner(name, keep)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=r"none, random, uniform, holitom, .*, but got 'holytom'"):
        make_pruner("holytom", 0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 3}, "Expected settings of holitom to be one of window_frames, tau, beta, neighbours"),
        ({"tau": 0}, "Expected tau above 0 to 1, but got 0"),
        ({"tau": float("nan")}, "Expected tau above 0 to 1, but got nan"),
        ({"beta": 1.5}, "Expected beta from 0 to 1, but got 1.5"),
        ({"neighbours": 0}, "Expected neighbours to be a whole number from 1 to 64, but got 0"),
        ({"window_frames": 2.5}, "Expected window_frames to be a whole number from 0 to 65536"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(settings: dict[str, float], expected: str) -> None:
    with pytest.raises(BadRequest, match=expected):
        make_pruner("holitom", 0.5, **settings)


def test_settings_reach_the_method() -> None:
    assert make_pruner("holitom", 0.5, tau=0.7) == load_pruner("holitom")(keep=0.5, tau=0.7)  # type: ignore[call-arg]
    with pytest.raises(BadRequest, match="Expected settings of uniform to be none, but got 'tau'"):
        make_pruner("uniform", 0.5, tau=0.7)


def test_random_draws_differ_by_seed_and_size_only() -> None:
    sources = {
        (seed, content, tokens): make_pruner("random", 0.2, seed=seed)
        .reduce(make_item(content, 5, tokens))
        .source.tolist()
        for seed in (0, 1)
        for content in (0, 1)
        for tokens in (40, 41)
    }
    assert sources[0, 0, 40] == sources[0, 1, 40]
    assert sources[0, 0, 40] != sources[1, 0, 40]
    assert sources[0, 0, 40] != sources[0, 0, 41]


def test_uniform_takes_the_middle_of_each_stretch() -> None:
    assert make_pruner("uniform", 0.25).reduce(make_item(0, 2, 8)).source.tolist() == [2, 6, 10, 14]
    assert make_pruner("uniform", 1.0).reduce(make_item(0, 2, 3)).source.tolist() == list(range(6))


def test_count_takes_the_ratio_as_written() -> None:
    assert exact_count(0.29, 100) == 29
    assert exact_count(0.1, 9) == 1
    assert exact_count(0.001, 9) == 1
    assert exact_count(1.0, 7) == 7
    assert exact_count(0.5, 0) == 0


def test_windows_cover_the_item() -> None:
    assert list(windows(130, 64)) == [(0, 64), (64, 128), (128, 130)]
    assert list(windows(130, 0)) == [(0, 130)]


def test_contract_and_registry_need_no_torch() -> None:
    code = "import sys, mmserve.pruning.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
