"""Training rows: the chat template's tokens, branches as if alone, and the semantic mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.evaluation.clipworld import Question
from mmserve.evaluation.tiny_forward import RowAttention, embed_row, row_states
from mmserve.evaluation.tiny_model import build_config, build_model, build_tokenizer
from mmserve.evaluation.tiny_rows import Row, RowBuilder, TinyTokenizer
from mmserve.pruning.base import Pruner
from mmserve.pruning.carriers import carrier_mask, carrier_slots, remaining, with_carriers
from mmserve.pruning.none import NoPruning
from mmserve.pruning.random import RandomPruning

TOKENIZER = build_tokenizer()
WORDS = TinyTokenizer(TOKENIZER)
ASKED = Question("colour", "What colour is the star?", "red")
OTHER = Question("count", "How many objects are there?", "3")


@pytest.fixture(scope="module")
def model() -> LlavaOnevisionForConditionalGeneration:
    return build_model(build_config(TOKENIZER), 0).eval()


def test_the_carrier_is_a_frames_last_token_and_sees_only_its_frame_and_the_past() -> None:
    frame = torch.tensor([-1, 0, 0, 1, 1, -1])
    assert carrier_slots(frame).tolist() == [False, False, True, False, True, False]
    assert remaining(frame).tolist() == [True, False, True, False, True, True]
    assert carrier_mask(frame).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 1, 0, 1, 1],
    ]


def test_the_carriers_embedding_is_the_frames_mean() -> None:
    frames = torch.randn(3, 36, 8)
    carried = with_carriers(frames)
    assert torch.equal(carried[:, :-1], frames[:, :-1])
    assert torch.allclose(carried[:, -1], frames.mean(1))


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((frames, 36, 256), np.float32))


def test_rows_have_the_tokens_of_the_chat_template() -> None:
    builder = RowBuilder(WORDS, carriers=False)
    builder.text("<|im_start|>user\nItem 1:")
    builder.image(torch.zeros(144, 256), alone=False)
    builder.text("\nItem 2:")
    builder.video(clip(2), newline=True)
    builder.branch([ASKED, OTHER])
    row = builder.row()
    text = (
        "<|im_start|>user\nItem 1:" + "<image>" * 145 + "\nItem 2:" + "<video>" * 73
        + "\nWhat colour is the star?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
        + "\n<|im_start|>user\nHow many objects are there?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    )  # fmt: skip
    assert row.tokens.tolist() == TOKENIZER.encode(text).ids
    assert row.positions.tolist() == list(range(len(row.tokens)))
    assert [TOKENIZER.decode([int(row.wanted[first])]) for _, first, _ in row.kinds] == ["red", "3"]
    assert torch.equal(row.tokens[row.asked_at + 1], row.wanted)


def short_row() -> Row:
    builder = RowBuilder(WORDS, carriers=False)
    builder.text("<|im_start|>user\n")
    builder.video(clip(2, 2), newline=False)
    builder.branch([OTHER], 1)
    return builder.row()


def two_items(carriers: bool) -> Row:
    builder = RowBuilder(WORDS, carriers)
    builder.text("<|im_start|>user\nItem 1:")
    builder.video(clip(3), newline=True)
    builder.text("\nItem 2:")
    builder.video(clip(2, 1), newline=True)
    builder.branch([ASKED])
    return builder.row()


@torch.no_grad()
def states(model: LlavaOnevisionForConditionalGeneration, row: Row, carriers: bool) -> Tensor:
    inner = model.model
    embedded = embed_row(row, inner.get_input_embeddings().weight, inner.image_newline)
    other = short_row()  # goes through the matrices alongside and must not matter
    beside = embed_row(other, inner.get_input_embeddings().weight, inner.image_newline)
    attends = [
        RowAttention(other, heads=4, carriers=not carriers),
        RowAttention(row, heads=4, carriers=carriers),
    ]
    both = row_states(inner.language_model, [beside, embedded], attends)
    return both[1][-1][0]


@pytest.mark.parametrize("carriers", [False, True])
@torch.no_grad()
def test_one_branch_is_what_transformers_computes(
    model: LlavaOnevisionForConditionalGeneration, carriers: bool
) -> None:
    row = two_items(carriers)
    size = len(row.tokens)
    frame = torch.cat([row.frame, torch.full((len(row.branch),), -1)])
    mask = carrier_mask(frame) if carriers else torch.ones(size, size, dtype=torch.bool).tril()
    inner = model.model
    expected = inner.language_model(
        inputs_embeds=embed_row(row, inner.get_input_embeddings().weight, inner.image_newline),
        attention_mask=torch.zeros(1, 1, size, size).masked_fill(~mask, -1e9),
        position_ids=row.positions[None],
    ).last_hidden_state[0]
    assert torch.allclose(states(model, row, carriers), expected, atol=2e-4)


@pytest.mark.parametrize("carriers", [False, True])
def test_a_branch_after_some_frames_is_as_if_the_video_ended_there(
    model: LlavaOnevisionForConditionalGeneration, carriers: bool
) -> None:
    def asked(frames: int, seen: list[int]) -> tuple[Row, Tensor]:
        builder = RowBuilder(WORDS, carriers)
        builder.text("<|im_start|>user\n")
        builder.video(clip(6)[:frames], newline=False)
        for count in seen:
            builder.branch([OTHER if count == 6 else ASKED], count)
        row = builder.row()
        return row, states(model, row, carriers)[row.asked_at]

    together_row, together = asked(6, [6, 4])
    alone_row, alone = asked(4, [4])
    assert together_row.kinds[1][0] == alone_row.kinds[0][0] == "colour"
    _, first, last = together_row.kinds[1]
    assert torch.allclose(together[first:last], alone, atol=2e-4)


def test_positions_leap_and_branches_follow() -> None:
    builder = RowBuilder(WORDS, carriers=False)
    builder.text("<|im_start|>user\n")
    builder.video(clip(3), newline=False, gap_before=1, gap=100)
    builder.branch([ASKED], 3)
    positions = builder.row().positions
    start = len(WORDS.ids("<|im_start|>user\n"))
    steps = (positions[1:] - positions[:-1]).tolist()
    assert steps[start + 35] == 101
    assert sum(steps) == len(steps) + 100


def mixture(pruner: Pruner | None, *, alone: bool = False) -> Row:
    builder = RowBuilder(WORDS, carriers=False, pruner=pruner)
    builder.text("<|im_start|>user\nItem 1:")
    picture = clip(4, 3).flatten(0, 1)
    builder.image(picture, alone=alone, saliency=picture[:, 0].abs())
    builder.text("\nItem 2:")
    frames = clip(3)
    builder.video(frames, newline=True, gap_before=1, gap=9, saliency=frames[..., 0].abs())
    builder.branch([ASKED])
    return builder.row()


@pytest.mark.parametrize("alone", [False, True])
def test_without_a_method_nothing_is_lost(alone: bool) -> None:
    whole, left = mixture(None, alone=alone), mixture(NoPruning(keep=1.0), alone=alone)
    for name in ("tokens", "positions", "frame", "item", "visual", "visual_at", "newline_at", "sees"):
        assert torch.equal(getattr(whole, name), getattr(left, name)), name
    assert whole.ended == left.ended


@pytest.mark.parametrize("alone", [False, True])
def test_what_is_left_stands_where_it_stood(alone: bool) -> None:
    whole, left = mixture(None, alone=alone), mixture(RandomPruning(keep=0.25), alone=alone)
    there = torch.isin(whole.positions, left.positions)
    assert torch.equal(whole.positions[there], left.positions)
    assert torch.equal(whole.tokens[there], left.tokens)
    pictured = 144 * (1 + alone)
    assert len(left.visual) == pictured // 4 + 3 * 36 // 4
    shown = dict(zip(whole.positions[whole.visual_at].tolist(), whole.visual, strict=True))
    for position, row in zip(left.positions[left.visual_at].tolist(), left.visual, strict=True):
        assert torch.equal(shown[position], row)
    # text and newlines stay
    assert len(left.newline_at) == len(whole.newline_at)
    assert len(whole.tokens) - len(left.tokens) == len(whole.visual) - len(left.visual)
    asked = len(whole.branch)
    assert torch.equal(whole.positions[-asked:], left.positions[-asked:])
    assert [item for _, item, _ in whole.ended] == [item for _, item, _ in left.ended]


def test_looking_at_other_items_than_the_one_asked_about_costs() -> None:
    builder = RowBuilder(WORDS, carriers=False)
    builder.text("<|im_start|>user\nItem 1:")
    builder.video(clip(1), newline=True)
    builder.text("\nItem 2:")
    builder.image(torch.zeros(144, 256), alone=False)
    builder.branch([Question("colour", "In item 2: What colour is the star?", "red")])
    row = builder.row()
    assert row.gated_item.unique().tolist() == [1]
    first = int(row.gated_at[0])
    assert TOKENIZER.decode(row.tokens[first - 3 : first + 1].tolist()) == " item 2:"
    assert int(row.gated_at[-1]) == len(row.tokens) - 2  # the answer's last token wants nothing
    assert [(item, frames) for _, item, frames in row.ended] == [(0, 1), (1, 1)]
    assert row.tokens[[at for at, _, _ in row.ended]].tolist() == [
        WORDS.media["video"],
        WORDS.media["image"],
    ]

    def strays(favoured: int, guided: bool) -> list[float]:
        attend = RowAttention(row, heads=1, carriers=False, guided=guided)
        key = torch.zeros(1, len(row.tokens), 2)
        key[0, : len(row.item), 0] = 20.0 * (row.item == favoured)
        for _ in range(3):
            attend(torch.ones_like(key), key, key)
        assert bool(attend.peeks) != guided
        return [float(stray) for stray in attend.strays]

    # of the items' own tokens in two layers and of the questions in the third
    assert strays(1, guided=False) == pytest.approx([0.0] * 3, abs=1e-2)
    assert min(strays(0, guided=False)) > 2
    assert len(strays(0, guided=True)) == 1


@torch.no_grad()
def test_in_guided_rows_an_item_is_as_if_alone(model: LlavaOnevisionForConditionalGeneration) -> None:
    inner = model.model

    def second(first: Tensor) -> Tensor:
        builder = RowBuilder(WORDS, carriers=False)
        for frames in (first, clip(2, 7)):
            builder.video(frames, newline=True)
        builder.branch([ASKED])
        row = builder.row()
        embedded = embed_row(row, inner.get_input_embeddings().weight, inner.image_newline)
        attend = RowAttention(row, heads=4, carriers=False, guided=True)
        (of_row,) = row_states(inner.language_model, [embedded], [attend])
        return of_row[-1][0, : len(row.item)][row.item == 1]

    assert torch.allclose(second(clip(2, 5)), second(clip(2, 6)), atol=1e-5)
