"""transformers' side of a benchmark, at its fastest public setting: sdpa, bf16, StaticCache, greedy.

It sees the pixels that mmserve's tower sees, made by the same code, since its own video processor
needs torchvision. The time for that counts, as it does on our side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration, StaticCache

from mmserve.bench.requests import Ask, messages, video
from mmserve.bench.side import Job, Outcome, SideConfig
from mmserve.doctor import report
from mmserve.media.preprocess import Preprocessing, video_pixels
from mmserve.models.layout.llava_onevision import Geometry

CANDIDATES = 200  # more than our side tells of, which may order them differently


class TransformersSide:
    def __init__(self, config: SideConfig) -> None:
        folder = Path(config.checkpoint)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.float32 if config.dtype == "float32" else fast_dtype(self._device)
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype=self._dtype, attn_implementation="sdpa"
        )
        self._model = model.to(self._device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._preprocessing = Preprocessing.from_model_dir(folder)
        self._geometry = Geometry.from_config(model.config.to_dict())
        self._context: tuple[Ask, StaticCache, Tensor] | None = None

    @torch.inference_mode()
    def run(self, job: Job) -> Outcome:
        if job.kind == "score":
            return self._score(job)
        if job.kind == "decode":
            return Outcome(seconds=self._decode(job.asks, job.tokens - 1))
        videos = self._videos(job.asks)
        together = job.kind == "together"
        batches = [range(len(job.asks))] if together else [[index] for index in range(len(job.asks))]
        started_at = time.perf_counter()
        for batch in batches:
            self._generate([job.asks[i] for i in batch], [videos[i] for i in batch], job.tokens)
        return Outcome(seconds=time.perf_counter() - started_at)

    def _videos(self, asks: Sequence[Ask]) -> list[NDArray[np.uint8]]:
        made = {
            (ask.video, ask.frames): video(ask.video, ask.frames, self._geometry.image_side) for ask in asks
        }
        return [made[ask.video, ask.frames] for ask in asks]

    def _inputs(self, asks: Sequence[Ask], videos: Sequence[NDArray[np.uint8]]) -> dict[str, Tensor]:
        """Prompts of equal length, so that neither padding nor a mask slows the batch down."""
        pixels = torch.stack([video_pixels(frames, self._preprocessing) for frames in videos])
        ids = torch.tensor(
            [self._prompt(ask, frames) for ask, frames in zip(asks, videos, strict=True)], device=self._device
        )
        return {"input_ids": ids, "pixel_values_videos": pixels.to(self._device, self._dtype)}

    def _prompt(self, ask: Ask, frames: NDArray[np.uint8]) -> list[int]:
        text: str = self._tokenizer.apply_chat_template(
            messages(ask, frames), tokenize=False, add_generation_prompt=True
        )
        expanded = text.replace("<video>", "<video>" * self._geometry.video_tokens(len(frames)))
        ids: list[int] = self._tokenizer.encode(expanded, add_special_tokens=False)
        return ids

    def _prefill(
        self, asks: Sequence[Ask], videos: Sequence[NDArray[np.uint8]], room: int
    ) -> tuple[StaticCache, Tensor]:
        inputs = self._inputs(asks, videos)
        length = inputs["input_ids"].shape[1]
        cache = StaticCache(config=self._model.config, max_cache_len=length + room)
        logits = self._model(**inputs, past_key_values=cache, logits_to_keep=1).logits
        return cache, logits[:, -1]

    def _continue(self, cache: StaticCache, token: Tensor, steps: int) -> list[Tensor]:
        """Greedy tokens [B, 1] after `token`."""
        tokens = []
        for _ in range(steps):
            logits = self._model(input_ids=token, past_key_values=cache).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        return tokens

    def _generate(
        self, asks: Sequence[Ask], videos: Sequence[NDArray[np.uint8]], tokens: int
    ) -> list[list[int]]:
        cache, logits = self._prefill(asks, videos, tokens)
        first = logits.argmax(-1, keepdim=True)
        made: list[list[int]] = torch.cat([first, *self._continue(cache, first, tokens - 1)], 1).tolist()
        return made

    def _decode(self, asks: Sequence[Ask], steps: int) -> float:
        """Seconds a step. Every row continues the first prompt: a step costs the same whatever was said."""
        if self._context is None or self._context[0] != asks[0]:
            cache, logits = self._prefill(asks[:1], self._videos(asks[:1]), 1)
            self._context = asks[0], cache, logits.argmax(-1, keepdim=True)
        _, prompt, first = self._context
        length = int(prompt.get_seq_length())
        cache = StaticCache(config=self._model.config, max_cache_len=length + steps + 1)
        for layer, source in zip(cache.layers, prompt.layers, strict=True):
            shape = (len(asks), *source.keys.shape[1:])
            layer.lazy_initialization(source.keys.expand(shape), source.values.expand(shape))
            layer.keys[:, :, :length] = source.keys[:, :, :length]
            layer.values[:, :, :length] = source.values[:, :, :length]
            layer.cumulative_length.fill_(length)
        token = first.expand(len(asks), 1)
        (token,) = self._continue(cache, token, 1)
        token.tolist()  # waits for the device
        started_at = time.perf_counter()
        self._continue(cache, token, steps)[-1].tolist()
        return (time.perf_counter() - started_at) / steps

    def _score(self, job: Job) -> Outcome:
        asks, videos = job.asks[:1], self._videos(job.asks[:1])
        inputs = self._inputs(asks, videos)
        logits = self._model(**inputs, logits_to_keep=0 if job.prompt_logprobs else 1).logits[0]
        logprobs = logits.float().log_softmax(-1)
        best = logprobs[-1].topk(min(CANDIDATES, logprobs.shape[1]))
        prompt: list[float] = []
        if job.prompt_logprobs:
            following = inputs["input_ids"][0, 1:, None]
            prompt = logprobs[:-1].gather(1, following)[:, 0].tolist()
        (token_ids,) = self._generate(asks, videos, job.tokens)
        return Outcome(
            token_ids=tuple(token_ids),
            candidates=dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
            prompt_logprobs=tuple(prompt),
        )

    def close(self) -> None:
        """Nothing outlives the process."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it; elsewhere a CPU would emulate it slowly."""
    if device.type == "cuda":
        return torch.bfloat16
    flags = report()["cpu"]["flags"]
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(flags) else torch.float32
