"""Which layers look themselves, and which repeat what was found below."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import pytest

from mmserve.attention.base import AttentionPattern, ChunkView, PatternMemory, make_pattern
from mmserve.attention.patterns.reuse import reused_index
from mmserve.attention.patterns.tri_shape import TriShape
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import AttentionIndex
from tests.attention.patterns.chunks import chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Looking(AttentionPattern):
    """Notes the layers in which it is asked."""

    name: ClassVar[str] = "looking"
    paper: ClassVar[str] = ""

    asked: list[int] = field(default_factory=list)

    @classmethod
    def everything(cls) -> Self:
        return cls()

    def index(self, view: ChunkView) -> AttentionIndex:
        self.asked.append(view.layer)
        return TriShape().index(view)


def test_every_third_layer_looks_and_the_others_repeat() -> None:
    pattern, memory = Looking(), PatternMemory()
    found = [reused_index(pattern, chunk(30, 60, layer=layer, memory=memory), 3) for layer in range(2, 9)]
    assert pattern.asked == [2, 5, 8]
    assert found[0] is found[1] is found[2]
    assert found[3] is found[4] is found[5] is not found[0]


def test_the_next_chunk_looks_again_from_its_first_layer() -> None:
    pattern, memory = Looking(), PatternMemory()
    for slots in (60, 90):
        for layer in range(2, 6):
            reused_index(pattern, chunk(30, slots, layer=layer, memory=memory), 2)
    assert pattern.asked == [2, 4] * 2


def test_a_layer_with_other_slots_looks_itself() -> None:
    pattern, memory = Looking(), PatternMemory()
    for layer, slots in ((2, 60), (3, 50), (4, 50)):
        reused_index(pattern, chunk(30, slots, layer=layer, memory=memory), 3)
    assert pattern.asked == [2, 3]


def test_every_layer_looks_where_none_is_to_be_repeated() -> None:
    pattern, memory = Looking(), PatternMemory()
    for layer in range(4):
        reused_index(pattern, chunk(30, 60, layer=layer, memory=memory), 1)
    assert pattern.asked == [0, 1, 2, 3]


def test_every_pattern_takes_the_setting() -> None:
    assert make_pattern("a_shape", reuse_every=3) == make_pattern("a_shape")
    for wrong in (0, "two", True):
        with pytest.raises(BadRequest, match="reuse_every"):
            make_pattern("a_shape", reuse_every=wrong)
