"""Budgets of visual tokens in their one form, and the shares that they are, exact to the token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmserve.budget import Budget, checked_keep, is_share, keep_under_load, read_keep, share_of
from mmserve.errors import BadRequest
from mmserve.pruning.base import count_by_window, exact_count, floor_share


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.25", 0.25),
        ("1", 1.0),
        ("64", 64),
        ("16/frame", "16/frame"),
        (" .5", 0.5),
    ],
)
def test_a_budget_has_one_form(text: str, budget: Budget) -> None:
    read = read_keep(text)
    assert (read, type(read)) == (budget, type(budget))
    assert checked_keep(read) == read
    assert is_share(read) is (isinstance(budget, float))


@pytest.mark.parametrize(
    "wrong", [0, -1, 1.5, float("nan"), float("inf"), True, None, "", "0/frame", "1.5/frame"]
)
def test_anything_else_is_explained(wrong: object) -> None:
    with pytest.raises(BadRequest, match="Expected keep_image of above 0"):
        checked_keep(wrong, "keep_image")


@pytest.mark.parametrize("wrong", ["nan", "inf", "x", "-3", "64.0", "1e3", "16 /frame", "9" * 40])
def test_text_that_is_no_budget_is_refused(wrong: str) -> None:
    with pytest.raises(BadRequest):
        read_keep(wrong)


def test_a_share_stays_what_it_is() -> None:
    assert share_of(0.3, 8, 196) == 0.3
    assert share_of(1.0, 1, 1) == 1.0


@given(frames=st.integers(1, 2048), tokens=st.integers(1, 4000), data=st.data())
def test_tokens_of_an_item_come_out_exact(frames: int, tokens: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(2, frames * tokens + 5))
    share = share_of(kept, frames, tokens)
    assert exact_count(share, frames * tokens) == min(kept, frames * tokens)


@given(
    frames=st.integers(1, 600),
    tokens=st.integers(1, 1000),
    kept=st.integers(1, 1100),
    window=st.integers(0, 65),
)
def test_tokens_per_frame_come_out_exact_in_every_window(
    frames: int, tokens: int, kept: int, window: int
) -> None:
    share = share_of(f"{kept}/frame", frames, tokens)
    for count in (1, 3, frames):
        assert floor_share(share, count * tokens) == count * min(kept, tokens)
    assert count_by_window(share, frames, tokens, window) == frames * min(kept, tokens)


def test_under_load_less_is_kept_in_a_line_down_to_the_floor() -> None:
    kept = [keep_under_load(0.25, 0.05, waiting, 16) for waiting in range(20)]
    assert kept[0] == 0.25
    assert kept[8] == 0.15
    assert kept[16:] == [0.05] * 4
    assert kept == sorted(kept, reverse=True)


@given(
    keep=st.floats(0.001, 1), share=st.floats(0.001, 1), waiting=st.integers(0, 50), full=st.integers(1, 40)
)
def test_under_load_the_ends_are_never_passed(keep: float, share: float, waiting: int, full: int) -> None:
    floor = keep * share
    assert floor <= keep_under_load(keep, floor, waiting, full) <= keep
    assert keep_under_load(keep, floor, full, full) <= max(floor, 0.5 * 10**-2 + floor)
