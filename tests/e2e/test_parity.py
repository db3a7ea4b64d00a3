"""The same greedy tokens and log-probabilities from transformers, one process, and three processes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from mmserve.evaluation.suites import Example, Media, examples
from mmserve.llm import LLM, RequestOutput
from mmserve.models.resolve import resolve
from mmserve.sampling import SamplingParams
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
)

from .conftest import Conversation, ask

TOKENS = 6
TOLERANCE = 2e-3


class Oracle:
    """transformers on the same checkpoint, fed with pixels computed here."""

    def __init__(self) -> None:
        path = resolve("tiny")
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.images = LlavaOnevisionImageProcessorPil.from_pretrained(path)

    @torch.inference_mode()
    def answer(
        self, messages: Conversation, videos: list[np.ndarray[Any, Any]], images: list[np.ndarray[Any, Any]]
    ) -> tuple[list[int], list[int], list[float]]:
        """Prompt ids, generated ids and their log-probabilities."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs: dict[str, Any] = {}
        counts = [len(video) * 36 + 1 for video in videos]
        for count in counts:
            text = text.replace("<video>", "<VIDEO>" * count, 1)
        text = text.replace("<VIDEO>", "<video>")
        if videos:
            # videos of one prompt have equal lengths here, as transformers wants them stacked
            pixels = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
            inputs["pixel_values_videos"] = pixels
        if images:
            made = self.images(images=[[Image.fromarray(image) for image in images]], return_tensors="pt")
            tokens = 145 if len(images) > 1 else 144 + 12 * 13
            text = text.replace("<image>", "<image>" * tokens)
            inputs |= {name: made[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
        ids = torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])
        made = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **inputs,
        )
        new = made.sequences[0, ids.shape[1] :].tolist()
        scores = [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, new, strict=True)]
        return ids[0].tolist(), new, scores


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def _decoded(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _mixed(example: Example) -> tuple[Conversation, list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """A clipworld-mixed question with its media as arrays."""
    content: list[dict[str, Any]] = []
    videos, images = [], []
    for part in example.parts:
        if not isinstance(part, Media):
            content.append({"type": "text", "text": part})
        elif part.modality == "video":
            videos.append(part.frames())
            content.append({"type": "video", "video": videos[-1], "fps": part.fps})
        else:
            images.append(part.frames()[0])
            content.append({"type": "image", "image": images[-1]})
    return [{"role": "user", "content": content}], videos, images


def _check(output: RequestOutput, prompt: list[int], tokens: list[int], scores: list[float]) -> None:
    answer = output.outputs[0]
    assert list(output.prompt_token_ids) == prompt
    assert list(answer.token_ids) == tokens
    assert answer.logprobs is not None
    ours = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert ours == pytest.approx(scores, abs=TOLERANCE)


def test_fifty_requests_agree_with_transformers_in_one_process_and_in_three(
    oracle: Oracle, llm: LLM, epd: LLM, basic_clips: list[tuple[Path, Example]]
) -> None:
    asked: list[Conversation] = []
    expected = []
    for clip, example in basic_clips:
        asked.append(ask(clip, example.question.text))
        expected.append(oracle.answer(asked[-1], [_decoded(clip)], []))
    for example in islice(examples("clipworld-mixed", 5), 10):
        messages, videos, images = _mixed(example)
        asked.append(messages)
        expected.append(oracle.answer(messages, videos, images))
    params = SamplingParams(max_tokens=TOKENS, logprobs=0)
    for side in (llm, epd):
        outputs = side.chat(asked, params)
        for output, (prompt, tokens, scores) in zip(outputs, expected, strict=True):
            _check(output, prompt, tokens, scores)
