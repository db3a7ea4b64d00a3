"""transformers itself on a LLaVA-OneVision checkpoint: the oracle for tokens, and the judge of `tiny`.

Pixels come from arrays and prompts from the checkpoint's own template; nothing of mmserve's engine
is used. Slow and one request at a time, on purpose.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
)

from mmserve.evaluation.clipworld import through_codec
from mmserve.evaluation.suites import Example, Media

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class OracleAnswer:
    """Prompt ids with placeholders expanded, greedy tokens, and the log-probability of each."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str


class TransformersOracle:
    """Greedy answers from `LlavaOnevisionForConditionalGeneration` in fp32 on the CPU.

    Frames must already have the model's own size: transformers' video processor needs torchvision.
    Videos of one prompt must have equally many frames, because transformers stacks them.
    """

    def __init__(self, path: Path) -> None:
        self._model = LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._images = LlavaOnevisionImageProcessorPil.from_pretrained(path)

    @torch.inference_mode()
    def answer(
        self, messages: list[dict[str, Any]], videos: list[Pixels], images: list[Pixels], max_new_tokens: int
    ) -> OracleAnswer:
        """`videos` are [T, S, S, 3], `images` [H, W, 3], both in the order of their parts in `messages`."""
        inputs: dict[str, Any] = {}
        counts: dict[str, list[int]] = {"<video>": [self._video_tokens(len(video)) for video in videos]}
        if videos:
            stacked = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3)
            inputs["pixel_values_videos"] = stacked.float() / 127.5 - 1
        if images:
            made = self._images([[Image.fromarray(image) for image in images]], return_tensors="pt")
            inputs |= {name: made[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
            packed = self._model.model.get_image_features(
                **{name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
            )
            counts["<image>"] = [len(features) for features in packed.pooler_output]
        ids = torch.tensor([self._prompt(messages, counts)])
        made = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **inputs,
        )
        new = made.sequences[0, ids.shape[1] :].tolist()
        scores = [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, new, strict=True)]
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        return OracleAnswer(ids[0].tolist(), new, scores, text)

    def _video_tokens(self, frames: int) -> int:
        vision = self._model.config.vision_config
        grid: int = vision.image_size // vision.patch_size
        side = math.ceil(grid / 2)
        return frames * side * side + 1

    def _prompt(self, messages: list[dict[str, Any]], counts: dict[str, list[int]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for token, repeats in counts.items():
            pieces = text.split(token)
            assert len(pieces) == len(repeats) + 1, "one placeholder per item"
            text = pieces[0] + "".join(
                token * n + piece for n, piece in zip(repeats, pieces[1:], strict=True)
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def ask(self, example: Example, max_new_tokens: int = 4) -> OracleAnswer:
        """A suite's question, its clips as they come back from H.264."""
        content: list[dict[str, Any]] = []
        videos: list[Pixels] = []
        images: list[Pixels] = []
        for part in example.parts:
            if not isinstance(part, Media):
                content.append({"type": "text", "text": part})
                continue
            content.append({"type": part.modality})
            if part.modality == "video":
                videos.append(through_codec(part.frames()))
            else:
                images.append(part.frames()[0])
        return self.answer([{"role": "user", "content": content}], videos, images, max_new_tokens)


def accuracy_by_kind(oracle: TransformersOracle, asked: Iterable[Example]) -> dict[str, tuple[int, int]]:
    """(right, asked) per question kind."""
    tally: dict[str, list[bool]] = defaultdict(list)
    for example in asked:
        answer = oracle.ask(example)
        tally[example.question.kind].append(answer.text.strip() == example.question.answer)
    return {kind: (sum(hits), len(hits)) for kind, hits in sorted(tally.items())}
