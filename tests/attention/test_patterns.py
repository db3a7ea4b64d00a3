"""What every registered pattern promises: a new one is picked up from the registry."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mmserve.attention.base import (
    PATTERNS,
    ChunkView,
    PatternMemory,
    load_pattern,
    make_pattern,
    takes_profile,
)
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import prefill_attention
from mmserve.methods import NAMES, WITH_PROFILE
from tests.attention.views import LAYOUTS, attend, causal, checked, index_of, kinds, view

every_pattern = pytest.mark.parametrize("name", PATTERNS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def seen(name: str, of: ChunkView) -> Tensor:
    """bool [q_heads, n, S]; dense where the pattern says so."""
    index = index_of(make_pattern(name).index(of))
    return causal(of).expand(of.queries.shape[1], -1, -1) if index is None else checked(index, of)


def test_parts_without_torch_know_the_patterns() -> None:
    assert NAMES["attention"] == ("dense", *PATTERNS)
    assert {name for name in PATTERNS if takes_profile(load_pattern(name))} == {*WITH_PROFILE} & {*PATTERNS}


@every_pattern
def test_a_pattern_says_what_it_is(name: str) -> None:
    method = load_pattern(name)
    assert method.name == name
    assert method.paper.startswith("https://arxiv.org/abs/")
    assert make_pattern(name).acts_at in ("prefill", "decode_step")
    assert make_pattern(name).count in ("exact", "bound")
    assert isinstance(method.trained_weights, bool)
    assert dataclasses.is_dataclass(method)
    assert make_pattern(name) == make_pattern(name)


@every_pattern
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="but got 'sinc'"):
        make_pattern(name, sinc=1)
    with pytest.raises(BadRequest, match="only a deployment chooses"):
        make_pattern(name, profile="/etc/passwd")


@every_layout
@every_pattern
def test_every_row_sees_itself_and_nothing_that_comes_later(name: str, layout: str) -> None:
    of = kinds(LAYOUTS[layout])
    slots = len(of.item)
    for rows in (range(slots), range(slots // 2, slots), range(3, slots - 9)):
        shown = view(of, rows)
        mask = seen(name, shown)
        assert not (mask & ~causal(shown)).any()
        assert mask[:, torch.arange(len(rows)), torch.from_numpy(shown.rows).long()].all()


@every_layout
@every_pattern
def test_with_everything_all_rows_see_all(name: str, layout: str) -> None:
    of = kinds(LAYOUTS[layout])
    pattern, memory = load_pattern(name).everything(), PatternMemory()
    for rows in (range(100), range(100, len(of.item))):
        for layer in (3, 4):
            shown = view(of, rows, layer=layer, memory=memory)
            index = index_of(pattern.index(shown))
            if index is not None:
                assert (checked(index, shown) == causal(shown)).all()


@every_pattern
def test_the_same_rows_get_the_same_index(name: str) -> None:
    of = kinds(LAYOUTS["images between"])
    rows = range(20, len(of.item) - 5)
    assert torch.equal(seen(name, view(of, rows)), seen(name, view(of, rows)))


@every_pattern
def test_kernels_compute_what_the_index_says(name: str) -> None:
    of = kinds(LAYOUTS["fragments"])
    shown = view(of, range(30, len(of.item)), heads=(6, 2))
    index = index_of(make_pattern(name).index(shown))
    if index is None:
        return
    found = prefill_attention(shown.queries, shown.keys, shown.values, index, scale=shown.scale)
    expected = attend(shown, checked(index, shown))
    torch.testing.assert_close(found.out.double(), expected, rtol=1e-5, atol=1e-5)


@every_pattern
def test_a_few_rows_of_a_long_prompt_and_few_slots_are_fine(name: str) -> None:
    of = kinds("t3 v60x8")
    for rows in (range(480, 484), range(482, 483), range(5), range(1)):
        shown = view(of, rows, heads=(2, 2))
        assert seen(name, shown).shape == (2, len(rows), rows.stop)
