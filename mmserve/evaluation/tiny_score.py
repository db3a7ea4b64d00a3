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
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.evaluation.suites import SUITES, Example, Verdict, examples, frames_seen, seen
from mmserve.evaluation.tiny_forward import RowAttention, embed_row, row_states
from mmserve.evaluation.tiny_pools import Embedded, embed_clip
from mmserve.evaluation.tiny_rows import Row, RowBuilder, TinyTokenizer
from mmserve.pruning.base import Pruner
from mmserve.pruning.holitom import HoliTom

Embeds = Callable[[NDArray[np.uint8], bool], Embedded]


def example_row(
    example: Example,
    tokenizer: TinyTokenizer,
    embed: Embeds,
    *,
    carriers: bool,
    pruner: Pruner | None = None,
) -> Row:
    builder = RowBuilder(tokenizer, carriers, pruner)
    images = sum(media.modality == "image" for media in example.media)
    text = "<|im_start|>user\n"
    for part in example.parts[:-1]:
        if isinstance(part, str):
            text += part
            continue
        builder.text(text)
        text = "\n"
        tokens, saliency = embed(seen(example, part), part.modality == "image")
        if part.modality == "image":
            builder.image(tokens, alone=images == 1, saliency=saliency)
        else:
            builder.video(tokens, newline=True, saliency=saliency)
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
    pruner: Pruner | None = None,
) -> list[Verdict]:
    """The first `limit` questions of a suite."""

    def embed(clip: NDArray[np.uint8], image: bool) -> Embedded:
        tokens, saliency = embed_clip(model, clip, image=image)
        return Embedded(tokens.float(), saliency)

    def is_right(example: Example) -> bool:
        row = example_row(example, tokenizer, embed, carriers=carriers, pruner=pruner)
        return answered(model, row, carriers=carriers)

    return [
        Verdict(example.question.kind, frames_seen(example), example.depth, is_right(example))
        for example in islice(examples(suite, seed), limit)
    ]


def accuracies(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: TinyTokenizer, *, seed: int, limit: int
) -> dict[str, float]:
    """Share of right answers on every suite: with the whole prompt, (+) from carriers alone, and (-) from the
    tenth of the visual tokens that HoliTom leaves.
    """
    found = {}
    for suite in SUITES:
        for sign, pruner in (("", None), ("+", None), ("-", HoliTom(keep=0.1))):
            verdicts = score_suite(
                model, tokenizer, suite, seed=seed, limit=limit, carriers=sign == "+", pruner=pruner
            )
            right = sum(verdict.right for verdict in verdicts)
            found[suite + sign] = round(right / limit, 3)
    return found
