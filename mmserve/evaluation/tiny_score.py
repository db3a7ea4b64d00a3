"""Accuracy of `tiny` on the held-out suites without generating: every answer's tokens at once.

An answer is right when each of its tokens is the most likely one, which is what greedy decoding would
say. Knows the suites and the model's forward, nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.evaluation.suites import SUITES, Example, Verdict, examples, frames_seen, seen
from mmserve.evaluation.tiny_forward import RowAttention, embed_row, row_states
from mmserve.evaluation.tiny_pools import embed_clip
from mmserve.evaluation.tiny_rows import Row, RowBuilder, TinyTokenizer

Embeds = Callable[[NDArray[np.uint8], bool], Tensor]


def example_row(example: Example, tokenizer: TinyTokenizer, embed: Embeds, *, carriers: bool) -> Row:
    builder = RowBuilder(tokenizer, carriers)
    images = sum(media.modality == "image" for media in example.media)
    text = "<|im_start|>user\n"
    for part in example.parts[:-1]:
        if isinstance(part, str):
            text += part
            continue
        builder.text(text)
        text = "\n"
        tokens = embed(seen(example, part), part.modality == "image")
        if part.modality == "image":
            builder.image(tokens, alone=images == 1)
        else:
            builder.video(tokens, newline=True)
    builder.branch([example.question])
    return builder.row()


@torch.no_grad()
def answered(model: LlavaOnevisionForConditionalGeneration, row: Row, *, carriers: bool) -> bool:
    inner = model.model
    table = inner.get_input_embeddings().weight
    embedded = embed_row(row, table, inner.image_newline)
    heads = model.config.text_config.num_attention_heads
    (states,) = row_states(
        inner.language_model, [embedded], [RowAttention(row, heads=heads, carriers=carriers)]
    )
    guesses = (states[-1][0, row.asked_at] @ table.T).argmax(-1)
    return bool((guesses == row.wanted).all())


def score_suite(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: TinyTokenizer,
    suite: str,
    *,
    seed: int,
    limit: int,
    carriers: bool,
) -> list[Verdict]:
    """The first `limit` questions of a suite."""

    def embed(clip: NDArray[np.uint8], image: bool) -> Tensor:
        return embed_clip(model, clip, image=image).float()

    return [
        Verdict(
            example.question.kind,
            frames_seen(example),
            example.depth,
            answered(model, example_row(example, tokenizer, embed, carriers=carriers), carriers=carriers),
        )
        for example in islice(examples(suite, seed), limit)
    ]


def accuracies(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: TinyTokenizer, *, seed: int, limit: int
) -> dict[str, float]:
    """Share of right answers on every suite, with the whole prompt and (+) from carriers alone."""
    found = {}
    for suite in SUITES:
        for carriers in (False, True):
            verdicts = score_suite(model, tokenizer, suite, seed=seed, limit=limit, carriers=carriers)
            right = sum(verdict.right for verdict in verdicts)
            found[suite + ("+" if carriers else "")] = round(right / limit, 3)
    return found
