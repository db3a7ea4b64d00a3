"""The whole model against transformers on random weights in fp32: what is seen, scored and generated.

The checkpoint is written by transformers and read by our loader, so both key layouts are covered too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.encoders.base import VisionEncoder
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder
from mmserve.models.layout import expand
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.models.loader import load_checkpoint, load_decoder, load_vision

IMAGE, VIDEO = 200, 201
SIDE, PATCH = 28, 4
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]
TEXT = {
    "vocab_size": 210,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# name -> text config, tied head, which state of the tower, key layout on disk
CASES: dict[str, tuple[PreTrainedConfig, bool, int | list[int], str]] = {
    "qwen2": (Qwen2Config(**TEXT), True, -1, "present"),
    "qwen3": (Qwen3Config(**TEXT), False, -2, "legacy"),
    "llama": (LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True), False, [1, -1], "present"),
}


class Case(NamedTuple):
    peer: LlavaOnevisionForConditionalGeneration
    config: LlavaOnevisionConfig
    decoder: TextDecoder
    vision: VisionEncoder


def build(name: str, folder: Path) -> Case:
    text, tied, layer, layout = CASES[name]
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=layout == "legacy",
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=layer,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(sum(map(ord, name)))
    peer = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in peer.parameters():
            # the usual small initial values would let wrong attention go unnoticed; no bias stays zero
            weight.add_(torch.randn_like(weight) * 0.15)
    peer.save_pretrained(folder)
    rename_keys(folder / "model.safetensors", layout)
    checkpoint = load_checkpoint(folder)
    return Case(peer, checkpoint.config, load_decoder(checkpoint), load_vision(checkpoint))


def rename_keys(file: Path, layout: str) -> None:
    """Write the given key layout, whichever one transformers chose."""
    legacy = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    }
    renames = legacy if layout == "present" else {new: old for old, new in legacy.items()}
    tensors = {}
    for key, tensor in load_file(file).items():
        found = [new + key.removeprefix(old) for old, new in renames.items() if key.startswith(old)]
        tensors[found[0] if found else key] = tensor
    save_file(tensors, file)


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with torch.inference_mode():
        yield build(request.param, tmp_path_factory.mktemp(request.param))


def pixels(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def generated(
    decoder: TextDecoder, x: Tensor, positions: np.ndarray, order: np.ndarray, chunk: int, steps: int
) -> tuple[Tensor, list[int]]:
    """Prompt logits of every row, and greedy tokens, through pages and in chunks."""
    config = decoder.config
    table = PageTable(config.layers, config.kv_heads, 400, 8)
    store = PageStore(400, 8, config.head_dim)
    hidden = []
    for start in range(0, len(x), chunk):
        rows = slice(start, min(start + chunk, len(x)))
        table.append("s", order[rows], positions[rows])
        attention = PagedAttention(table, store, [SequenceRows("s", 0, rows.stop - start)])
        hidden.append(decoder(x[rows], torch.from_numpy(positions[rows]), attention.attend))
    logits = decoder.logits(torch.cat(hidden))
    tokens = [int(logits[-1].argmax())]
    for step in range(steps - 1):
        new = np.array([len(x) + step], np.int32)
        table.append("s", new, new)
        attention = PagedAttention(table, store, [SequenceRows("s", 0, 1)])
        out = decoder(decoder.embed(torch.tensor(tokens[-1:])), torch.from_numpy(new), attention.attend)
        tokens.append(int(decoder.logits(out)[0].argmax()))
    return logits, tokens


def test_video_embeddings_equal_transformers(case: Case) -> None:
    vision = case.vision
    frames = pixels(11, 1)  # more than one batch of the encoder
    expected = case.peer.model.get_video_features(frames[None]).pooler_output[0]
    found = vision.frames(vision.features(frames))
    torch.testing.assert_close(found.embeddings.flatten(0, 1), expected[:-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(vision.newline, expected[-1])
    alone = vision.frames(vision.features(frames[3:4]))
    torch.testing.assert_close(alone.embeddings[0], found.embeddings[3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.saliency[0], found.saliency[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(20, 40), (90, 31), (57, 56), (5, 100)])
def test_image_embeddings_equal_transformers(case: Case, size: tuple[int, int]) -> None:
    vision, geometry = case.vision, Geometry.from_config(case.config.to_dict())
    crops = pixels(geometry.image_crops(*size), 2)
    expected = case.peer.model.get_image_features(
        crops[None], torch.tensor([size]), vision_aspect_ratio="anyres_max_2"
    ).pooler_output[0]
    found = vision.pack(vision.features(crops), size)
    assert len(found.embeddings) == geometry.image_tokens(*size)
    torch.testing.assert_close(found.embeddings, expected, rtol=1e-4, atol=1e-5)
    is_newline = (found.embeddings == vision.newline).all(-1)
    assert torch.equal(found.is_newline, is_newline)
    assert torch.equal(vision.newline_rows(size, len(crops)), is_newline)
    assert torch.equal(found.saliency == 0, is_newline)


def test_one_of_several_images_equals_transformers(case: Case) -> None:
    vision = case.vision
    crops = pixels(2, 3)
    expected = case.peer.model.get_image_features(
        crops[:, None], torch.tensor([[20, 40], [50, 50]]), batch_num_images=torch.tensor([2])
    ).pooler_output
    for crop, one in zip(crops, expected, strict=True):
        found = vision.pack(vision.features(crop[None]), (20, 40))
        torch.testing.assert_close(found.embeddings, one, rtol=1e-4, atol=1e-5)
        assert found.is_newline.tolist() == [False] * 49 + [True]


def test_saliency_is_the_attention_received_in_the_last_used_layer(case: Case) -> None:
    frames = pixels(2, 4)
    tower = case.peer.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(frames, output_attentions=True).attentions
    last = maps[-2] if case.config.vision_feature_layer == -2 else maps[-1]
    received = last.mean((1, 2))
    expected = case.peer.model.apply_pooling(received[..., None])[..., 0]
    found = case.vision.frames(case.vision.features(frames)).saliency
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_and_greedy_tokens_equal_transformers(case: Case, chunk: int) -> None:
    decoder, vision = case.decoder, case.vision
    frames = pixels(2, 5)
    encoded = vision.frames(vision.features(frames))
    visual = torch.cat([encoded.embeddings.flatten(0, 1), vision.newline[None]])

    token_ids = torch.from_numpy(expand([7, 8, VIDEO, 9, 10, 11], [len(visual)], (IMAGE, VIDEO)))
    x = decoder.embed(token_ids).clone()
    x[token_ids == VIDEO] = visual
    order = np.arange(len(x), dtype=np.int32)
    logits, tokens = generated(decoder, x, order, order, chunk, 16)

    inputs = {"input_ids": token_ids[None], "pixel_values_videos": frames[None]}
    expected = case.peer(**inputs).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    peer = case.peer.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert tokens == peer[0, len(token_ids) :].tolist()
    assert len(set(tokens)) > 2, "a constant answer would prove little"
