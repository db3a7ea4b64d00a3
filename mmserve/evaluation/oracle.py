"""transformers itself on a LLaVA-OneVision checkpoint: the oracle for tokens, and the judge of `tiny`.

Pixels come from arrays and prompts from the checkpoint's own template; nothing of mmserve's engine
is used. Slow and one request at a time, on purpose.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
)

from mmserve.evaluation.suites import Example, Media, Verdict, frames_seen, seen
from mmserve.pruning.carriers import carrier_mask, remaining, with_carriers

Pixels = NDArray[np.uint8]
# what of its media a question comes with; "carriers" leaves only those for decoding
View = Literal["all", "carriers", "random", "one-frame", "blind"]
RANDOM_SHARE = 0.1  # of the visual tokens


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
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._images = LlavaOnevisionImageProcessorPil.from_pretrained(path)

    @torch.inference_mode()
    def answer(
        self, messages: list[dict[str, Any]], videos: list[Pixels], images: list[Pixels], max_new_tokens: int
    ) -> OracleAnswer:
        """`videos` are [T, S, S, 3], `images` [H, W, 3], both in the order of their parts in `messages`."""
        ids, inputs = self._inputs(messages, videos, images)
        made = self.model.generate(
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
        return self._answer(ids, new, scores)

    @torch.inference_mode()
    def answer_reduced(
        self,
        messages: list[dict[str, Any]],
        videos: list[Pixels],
        images: list[Pixels],
        max_new_tokens: int,
        *,
        share: float,
        seed: int,
    ) -> OracleAnswer:
        """With a random `share` of the visual tokens, where they stood in the whole prompt."""
        ids, inputs = self._inputs(messages, videos, images)
        embedded, visual = self._embedded(ids, inputs)
        places = visual.nonzero()[:, 0]
        drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        kept = ~visual
        kept[places[drawn[: math.ceil(share * len(places))]]] = True
        places = kept.nonzero()[:, 0][None]
        made = self.model.model.language_model(
            inputs_embeds=embedded[:, kept], position_ids=places, use_cache=True
        )
        return self._continued(ids, made, max_new_tokens)

    @torch.inference_mode()
    def answer_from_carriers(
        self, messages: list[dict[str, Any]], videos: list[Pixels], images: list[Pixels], max_new_tokens: int
    ) -> OracleAnswer:
        """Under VideoScan's semantic mask; only text, images and carriers stay for decoding."""
        ids, inputs = self._inputs(messages, videos, images)
        embedded, _ = self._embedded(ids, inputs)
        language = self.model.model.language_model
        frame = self._frames(ids[0], [len(video) for video in videos])
        inside = frame >= 0
        if inside.any():
            size = self._video_tokens(1) - 1
            embedded[0, inside] = with_carriers(embedded[0, inside].unflatten(0, (-1, size))).flatten(0, 1)
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1]).masked_fill(~carrier_mask(frame), -math.inf)
        made = language(inputs_embeds=embedded, attention_mask=mask, use_cache=True)
        for layer in made.past_key_values.layers:
            layer.keys = layer.keys[:, :, remaining(frame)]
            layer.values = layer.values[:, :, remaining(frame)]
        return self._continued(ids, made, max_new_tokens)

    def _continued(self, ids: torch.Tensor, made: Any, max_new_tokens: int) -> OracleAnswer:  # noqa: ANN401
        """Greedy tokens behind a prompt that a forward pass was `made` of, perhaps not of all its tokens."""
        config, language = self.model.config, self.model.model.language_model
        new: list[int] = []
        scores: list[float] = []
        while len(new) < max_new_tokens:
            logprobs = self.model.lm_head(made.last_hidden_state[0, -1]).log_softmax(-1)
            new.append(int(logprobs.argmax()))
            scores.append(float(logprobs[new[-1]]))
            if new[-1] == config.text_config.eos_token_id:
                break
            made = language(
                input_ids=torch.tensor([new[-1:]]),
                position_ids=torch.tensor([[ids.shape[1] + len(new) - 1]]),
                past_key_values=made.past_key_values,
                use_cache=True,
            )
        return self._answer(ids, new, scores)

    def _embedded(self, ids: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [1, S, D] of a prompt with its media, and which of its tokens are visual."""
        inner, config = self.model.model, self.model.config
        embedded = inner.get_input_embeddings()(ids)
        video, image = ids[0] == config.video_token_id, ids[0] == config.image_token_id
        if video.any():
            features = inner.get_video_features(inputs["pixel_values_videos"]).pooler_output
            embedded[0, video] = features.flatten(0, 1)
        if image.any():
            pictures = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
            embedded[0, image] = torch.cat(list(inner.get_image_features(**pictures).pooler_output))
        return embedded, video | image

    def _frames(self, ids: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The number of the frame each token of a prompt belongs to, -1 for text, images and newlines."""
        frame = torch.full_like(ids, -1)
        size = self._video_tokens(1) - 1
        numbers: list[int] = []
        for count in counts:
            first = numbers[-2] + 1 if numbers else 0
            numbers += [first + index for index in range(count) for _ in range(size)] + [-1]
        frame[ids == self.model.config.video_token_id] = torch.tensor(numbers, dtype=ids.dtype)
        return frame

    def _inputs(
        self, messages: list[dict[str, Any]], videos: list[Pixels], images: list[Pixels]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        inputs: dict[str, Any] = {}
        counts: dict[str, list[int]] = {"<video>": [self._video_tokens(len(video)) for video in videos]}
        if videos:
            stacked = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3)
            inputs["pixel_values_videos"] = stacked.float() / 127.5 - 1
        if images:
            made = self._images([[Image.fromarray(image) for image in images]], return_tensors="pt")
            inputs |= {name: made[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
            packed = self.model.model.get_image_features(
                **{name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
            )
            counts["<image>"] = [len(features) for features in packed.pooler_output]
        return torch.tensor([self._prompt(messages, counts)]), inputs

    def _answer(self, ids: torch.Tensor, new: list[int], scores: list[float]) -> OracleAnswer:
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        return OracleAnswer(ids[0].tolist(), new, scores, text)

    def _video_tokens(self, frames: int) -> int:
        vision = self.model.config.vision_config
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

    def ask(self, example: Example, *, view: View = "all", max_new_tokens: int = 4) -> OracleAnswer:
        """A suite's question, its clips as they come back from H.264."""
        content: list[dict[str, Any]] = []
        videos: list[Pixels] = []
        images: list[Pixels] = []
        for part in example.parts:
            if not isinstance(part, Media):
                content.append({"type": "text", "text": part})
                continue
            if view == "blind":
                continue
            content.append({"type": part.modality})
            clip = seen(example, part)
            if part.modality == "video":
                videos.append(clip[len(clip) // 2 :][:1] if view == "one-frame" else clip)
            else:
                images.append(clip[0])
        messages = [{"role": "user", "content": content}]
        if view == "carriers":
            return self.answer_from_carriers(messages, videos, images, max_new_tokens)
        if view == "random":
            seed = zlib.crc32(example.example_id.encode())
            return self.answer_reduced(
                messages, videos, images, max_new_tokens, share=RANDOM_SHARE, seed=seed
            )
        return self.answer(messages, videos, images, max_new_tokens)


def judge(oracle: TransformersOracle, asked: Iterable[Example], view: View = "all") -> list[Verdict]:
    return [
        Verdict(
            example.question.kind,
            frames_seen(example),
            example.depth,
            oracle.ask(example, view=view).text.strip() == example.question.answer,
        )
        for example in asked
    ]
