"""Small random LLaVA-OneVision checkpoints, requests to them, and transformers as their oracle in fp32.

Everything follows from a seed. Knows nothing about how mmserve is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmserve.media.preprocess import Preprocessing, image_pixels, video_pixels
from mmserve.models.layout import expand
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.models.resolve import resolve

Pixels = NDArray[np.uint8]

ATTENTION_SCORES = 2.0  # their standard deviation: a few of some hundred keys then count
LOGITS = 3.0  # the same of the last layer's
# (image side, patch side): patches per side are 4 to 7, so pooled grids are even and odd
TOWERS = ((16, 4), (20, 4), (23, 4), (30, 5), (28, 4))
FRAMES = (1, 2, 3, 5, 8, 9, 16, 17, 32, 33)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRequest:
    """Token ids with one placeholder per media item; the media of each kind in that order."""

    token_ids: tuple[int, ...]
    videos: tuple[Pixels, ...] = ()  # [T, H, W, 3]
    images: tuple[Pixels, ...] = ()  # [H, W, 3]

    @property
    def some_frames(self) -> set[int]:
        """First, middle and last of the first video."""
        frames = len(self.videos[0]) if self.videos else 0
        return {0, frames // 2, frames - 1} if frames else set()


@dataclass(frozen=True, slots=True)
class Expected:
    """What transformers says about a prompt and an answer to it.

    `prompt_logprobs` are those of all expanded prompt tokens but the first.
    """

    prompt_ids: tuple[int, ...]
    prompt_logprobs: Tensor
    logits: Tensor  # [answer, V], each row given all tokens of the answer before it


def random_model(seed: int, folder: Path) -> RandomOracle:
    """Write a checkpoint into `folder`, and return transformers' view of it."""
    config = random_config(seed)
    with torch.device("meta"):
        peer = LlavaOnevisionForConditionalGeneration(config)
    peer = peer.to_empty(device="cpu").eval()
    peer.tie_weights()
    _initialise(peer, seed)
    peer.save_pretrained(folder)
    _write_processors(config, folder)
    return RandomOracle(folder)


def random_config(seed: int) -> LlavaOnevisionConfig:
    random = Random(seed)
    tiny = LlavaOnevisionConfig.from_pretrained(resolve("tiny"))
    side, patch = random.choice(TOWERS)
    tower_layers = random.choice((1, 2))
    tower_heads = random.choice((1, 2, 3))
    kv_heads = random.choice((1, 2, 3))
    tied = random.choice((False, True))
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=tower_heads * random.choice((8, 12, 14)),
            intermediate_size=random.choice((24, 37)),
            num_hidden_layers=tower_layers,
            num_attention_heads=tower_heads,
            image_size=side,
            patch_size=patch,
            vision_use_head=random.choice((False, True)),
        ),
        text_config=Qwen2Config(
            vocab_size=tiny.text_config.vocab_size + random.choice((0, 6, 64)),
            hidden_size=random.choice((33, 45, 48, 58, 63)),
            intermediate_size=random.choice((55, 80, 97)),
            num_hidden_layers=random.choice((1, 2, 3)),
            num_attention_heads=kv_heads * (1, 2, 4, 7)[seed % 4],
            num_key_value_heads=kv_heads,
            head_dim=random.choice((8, 10, 16, 22, 32)),
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": random.choice((1e3, 1e4, 1e6))},
            tie_word_embeddings=tied,
            bos_token_id=tiny.text_config.bos_token_id,
            eos_token_id=tiny.text_config.eos_token_id,
            pad_token_id=tiny.text_config.pad_token_id,
        ),
        image_token_id=tiny.image_token_id,
        video_token_id=tiny.video_token_id,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [side, 3 * side]],
        vision_aspect_ratio=random.choice(("anyres_max_2", "anyres_max_9")),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1 if tower_layers == 1 else random.choice((-1, -2)),
        tie_word_embeddings=tied,
        dtype="float32",
    )


@torch.no_grad()
def _initialise(peer: LlavaOnevisionForConditionalGeneration, seed: int) -> None:
    """Every activation stays near 1, and attention finds few keys, so that each frame matters."""
    config, generator = peer.config, torch.Generator().manual_seed(seed)
    width = config.text_config.hidden_size
    for name, weight in peer.named_parameters():
        if "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight"):
            weight.fill_(LOGITS if name == "model.language_model.norm.weight" else 1.0)
            continue
        if "embed_tokens" in name or "lm_head" in name:
            scale = width**-0.5
        elif weight.ndim == 1:
            scale = 0.1
        elif "position_embedding" in name:
            scale = 0.5
        else:
            scale = prod(weight.shape[1:]) ** -0.5
            if "q_proj" in name or "k_proj" in name:
                scale *= ATTENTION_SCORES**0.5
        weight.normal_(0, scale, generator=generator)
    for table in {peer.get_input_embeddings().weight, peer.lm_head.weight}:
        # placeholders are never the likeliest token, so no answer contains one
        table[[config.image_token_id, config.video_token_id]] = 0


def _write_processors(config: LlavaOnevisionConfig, folder: Path) -> None:
    tiny = resolve("tiny")
    side = config.vision_config.image_size
    size = {"size": {"height": side, "width": side}}
    changes: dict[str, dict[str, object]] = {
        "preprocessor_config.json": size | {"image_grid_pinpoints": config.image_grid_pinpoints},
        "video_preprocessor_config.json": {**size},
        "processor_config.json": {"vision_aspect_ratio": config.vision_aspect_ratio},
    }
    for name, changed in changes.items():
        content = json.loads((tiny / name).read_text()) | changed
        (folder / name).write_text(json.dumps(content))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder / name)


def random_requests(seed: int, config: LlavaOnevisionConfig) -> list[RandomRequest]:
    """Text, videos, images and mixtures; the last two ask about the same video."""
    random, pixels = Random(seed), np.random.default_rng(seed)
    image, video = config.image_token_id, config.video_token_id
    few, many = FRAMES[seed % 5], FRAMES[5 + seed % 5]

    def clip(frames: int) -> Pixels:
        return _blocks(pixels, frames, random.randint(5, 60), random.randint(5, 60))

    def picture() -> Pixels:
        image: Pixels = _blocks(pixels, 1, random.randint(5, 90), random.randint(5, 90))[0]
        return image

    def asks(*media: int) -> tuple[int, ...]:
        """Random text around the placeholders."""
        words = range(300, image)
        ids = random.choices(words, k=random.randint(1, 9))
        for placeholder in media:
            ids += [placeholder, *random.choices(words, k=random.randint(0, 9))]
        return (*ids, random.choice(words))

    shared = clip(many)
    return [
        RandomRequest(token_ids=asks()),
        RandomRequest(token_ids=(random.randrange(300),)),
        RandomRequest(token_ids=asks(video), videos=(clip(few),)),
        RandomRequest(token_ids=asks(image), images=(picture(),)),
        RandomRequest(token_ids=asks(image, image), images=(picture(), picture())),
        RandomRequest(
            token_ids=asks(video, image, video), videos=(clip(few), clip(many // 3)), images=(picture(),)
        ),
        RandomRequest(token_ids=asks(video), videos=(shared,)),
        RandomRequest(token_ids=asks(image, video, image), videos=(shared,), images=(picture(), picture())),
    ]


def _blocks(pixels: np.random.Generator, frames: int, height: int, width: int) -> Pixels:
    """Coloured blocks of 5 pixels: noise would be grey once it is resized."""
    small = pixels.integers(0, 256, (frames, -(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    large = small.repeat(5, axis=1).repeat(5, axis=2)
    return np.ascontiguousarray(large[:, :height, :width])


class RandomOracle:
    """transformers on a checkpoint. Pixels are made by mmserve's preprocessing, all else by transformers."""

    def __init__(self, folder: Path) -> None:
        self._model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.config = self._model.config
        self._preprocessing = Preprocessing.from_model_dir(folder)
        self._geometry = Geometry.from_config(self.config.to_dict())

    @torch.inference_mode()
    def expected(self, request: RandomRequest, answer: Sequence[int]) -> Expected:
        """One pass over the prompt and an answer.

        Greedy tokens are those that are the best after all before them, so no loop is needed to check.
        """
        prompt = self._expanded(request)
        ids = torch.tensor([[*prompt, *answer]])
        logits = self._model(input_ids=ids, **self._pixels(request)).logits[0]
        inside = logits[: len(prompt) - 1].log_softmax(-1)
        logprobs = inside.gather(1, ids[0, 1 : len(prompt), None])[:, 0]
        return Expected(prompt, logprobs, logits[len(prompt) - 1 : -1])

    def sensitivity(self, request: RandomRequest, frame: int) -> float:
        """How far the negative of one frame of the first video moves a prompt log-probability at most."""
        video = request.videos[0].copy()
        video[frame] = 255 - video[frame]
        other = replace(request, videos=(video, *request.videos[1:]))
        before, after = (self.expected(asked, [0]).prompt_logprobs for asked in (request, other))
        return float((before - after).abs().max())

    def _expanded(self, request: RandomRequest) -> tuple[int, ...]:
        image, video = self.config.image_token_id, self.config.video_token_id
        frames = iter(request.videos)
        sizes = iter([(image.shape[0], image.shape[1]) for image in request.images])
        geometry, several = self._geometry, len(request.images)
        counts = [
            geometry.video_tokens(len(next(frames)))
            if token == video
            else geometry.image_tokens(*next(sizes), several)
            for token in request.token_ids
            if token in (image, video)
        ]
        return tuple(expand(request.token_ids, counts, (image, video)).tolist())

    def _pixels(self, request: RandomRequest) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if request.images:
            several = len(request.images) > 1
            crops = [image_pixels(image, self._preprocessing, tiled=not several) for image in request.images]
            made["pixel_values"] = torch.stack(crops)
            made["image_sizes"] = torch.tensor([image.shape[:2] for image in request.images])
            made["batch_num_images"] = torch.tensor([len(request.images)])
        videos = [video_pixels(video, self._preprocessing) for video in request.videos]
        if len({len(video) for video in videos}) == 1:
            made["pixel_values_videos"] = torch.stack(videos)
        elif videos:
            # transformers stacks the videos of a call, so those of different lengths are encoded apart
            features = [self._model.get_video_features(video[None]).pooler_output for video in videos]
            found = {"video": BaseModelOutputWithPooling(pooler_output=torch.cat(features, 1))}
            if made:
                found["image"] = self._model.get_image_features(**made)
            return {"mm_encoder_outputs": found}
        return made
