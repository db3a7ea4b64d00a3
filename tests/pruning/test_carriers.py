"""VideoScan's carriers: the rule that checkpoints are trained with, and the encoder's part of it."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.errors import BadRequest
from mmserve.pruning.base import VisualItem, load_pruner, make_pruner, window_frames
from mmserve.pruning.carriers import (
    FOREVER,
    CarrierBank,
    SemanticCarriers,
    carrier_mask,
    remaining,
    seen_until,
)

# frames of 1 to 4 tokens and stretches of text, numbered like the oracle of transformers does
prompts = st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=12).map(
    lambda pieces: [
        number if is_frame else -1 for number, (is_frame, length) in enumerate(pieces) for _ in range(length)
    ]
)


def sees(frame: list[int], row: int, column: int) -> bool:
    """The paper's rule, one pair at a time."""
    if column > row:
        return False
    if frame[column] < 0 or frame[column] == frame[row]:
        return True
    return column == max(place for place, number in enumerate(frame) if number == frame[column])


@given(frame=prompts)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_mask_is_the_papers(frame: list[int]) -> None:
    mask = carrier_mask(torch.tensor(frame))
    count = range(len(frame))
    assert mask.tolist() == [[sees(frame, row, column) for column in count] for row in count]


@given(frame=prompts)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_remains_is_seen_for_ever(frame: list[int]) -> None:
    tensor = torch.tensor(frame)
    until, stays = seen_until(tensor), remaining(tensor)
    assert (until == FOREVER).tolist() == stays.tolist()
    frames = {number for number, _ in groupby(frame) if number >= 0}
    assert int(stays.sum()) == frame.count(-1) + len(frames)


def item(frames: int, tokens: int) -> VisualItem:
    generator = torch.Generator().manual_seed(0)
    return VisualItem(
        embeddings=torch.randn(frames, tokens, 8, generator=generator), saliency=torch.rand(frames, tokens)
    )


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (1, 9), (5, 1), (7, 4)])
def test_the_last_token_of_every_frame_becomes_its_mean(frames: int, tokens: int) -> None:
    pruner, video = SemanticCarriers(), item(frames, tokens)
    reduced = pruner.reduce(video)
    assert reduced.source.tolist() == list(range(frames * tokens))
    assert pruner.plan(frames, tokens) == frames * tokens
    found = reduced.embeddings.unflatten(0, (frames, tokens))
    assert torch.equal(found[:, :-1], video.embeddings[:, :-1])
    torch.testing.assert_close(found[:, -1], video.embeddings.mean(1))
    assert pruner.lasting(frames) == frames


def test_an_image_stays_as_it_is() -> None:
    image = item(1, 9)
    whole = VisualItem(embeddings=image.embeddings, saliency=image.saliency, modality="image")
    assert torch.equal(SemanticCarriers().reduce(whole).embeddings, image.embeddings[0])


def test_frames_are_reduced_one_by_one_and_the_checkpoint_has_to_know_carriers() -> None:
    method = load_pruner("carriers")
    assert vars(method)["acts_at"] == "prefill"
    assert method.modalities == ("video",)
    assert method.trained_weights
    assert window_frames(make_pruner("carriers", 1.0)) == 1


def test_there_is_no_share_to_keep() -> None:
    with pytest.raises(BadRequest, match="Expected no keep with prune carriers"):
        make_pruner("carriers", 0.5)


def brute_force(carriers: list[list[float]], size: int) -> list[int | None]:
    """Which carrier leaves with each that comes: all neighbours compared anew."""
    kept: list[int] = []
    leaving: list[int | None] = []
    units = torch.nn.functional.normalize(torch.tensor(carriers), dim=1)
    for number in range(len(carriers)):
        kept.append(number)
        if len(kept) <= size:
            leaving.append(None)
            continue
        alike = [float(units[one] @ units[other]) for one, other in pairwise(kept)]
        leaving.append(kept.pop(alike.index(max(alike))))
    return leaving


@pytest.mark.parametrize("size", [1, 2, 5, 30])
@pytest.mark.parametrize("seed", range(4))
def test_of_the_neighbours_that_are_most_alike_the_older_one_leaves(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    carriers = torch.randn(40, 3, generator=generator)
    bank = CarrierBank(size)
    found = [bank.add(number, carrier) for number, carrier in enumerate(carriers)]
    assert found == brute_force(carriers.tolist(), size)
    assert sum(name is not None for name in found) == 40 - size


def test_of_frames_that_are_all_alike_the_oldest_leaves() -> None:
    bank = CarrierBank(2)
    assert [bank.add(number, torch.ones(4)) for number in range(5)] == [None, None, 0, 1, 2]


@pytest.mark.parametrize("memory", [0, -1, 2.5, True])
def test_a_memory_is_a_number_of_carriers(memory: float) -> None:
    with pytest.raises(BadRequest, match="Expected memory to be a whole number"):
        make_pruner("carriers", 1.0, memory=memory)
    assert SemanticCarriers(memory=3).lasting(2) == 2
    assert SemanticCarriers(memory=3).lasting(9) == 3
