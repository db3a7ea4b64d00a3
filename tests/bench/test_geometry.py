"""Checkpoints of made-up weights: sizes, reproducible files, and attention that is about something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.bench import geometry as module
from mmserve.bench.bound import kv_bytes_per_token, step_bytes
from mmserve.bench.geometry import GEOMETRIES, build_config, checkpoint, geometry
from mmserve.bench.requests import QUESTIONS, question, video
from mmserve.errors import BadRequest
from mmserve.models.chat import ChatFormat
from mmserve.models.loader import decoder_config, load_checkpoint, weights_revision

MILLIONS = {"nano": 0.2, "ov-mini": 101.0, "ov-balanced": 23.9, "ov-0.5b": 893.7, "ov-7b": 8030.8}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sizes_are_those_of_the_models(name: str) -> None:
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(build_config(geometry(name)))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1) == MILLIONS[name]


def test_an_unknown_geometry_is_refused() -> None:
    with pytest.raises(BadRequest, match="ov-mini"):
        geometry("ov-huge")


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again = checkpoint("nano", 3, tmp_path / "a"), checkpoint("nano", 3, tmp_path / "b")
    assert weights_revision(first) == weights_revision(again)
    assert weights_revision(first) != weights_revision(checkpoint("nano", 4, tmp_path / "a"))
    assert list((tmp_path / "a").glob("*.part")) == []


def test_a_checkpoint_is_made_once(tmp_path: Path) -> None:
    folder = checkpoint("nano", 0, tmp_path)
    (folder / "mark").touch()
    assert (checkpoint("nano", 0, tmp_path) / "mark").exists()


def test_a_big_checkpoint_is_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint("nano", 0, tmp_path / "whole")
    monkeypatch.setattr(module, "SHARD_BYTES", 100_000)
    parts = checkpoint("nano", 0, tmp_path / "parts")
    assert len(list(parts.glob("*.safetensors"))) > 1
    states = [
        LlavaOnevisionForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (whole, parts)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_questions_have_equally_many_tokens(tmp_path: Path) -> None:
    chat = ChatFormat.from_model_dir(checkpoint("nano", 0, tmp_path))
    encoded = [
        chat.encode([{"role": "user", "content": [{"type": "text", "text": question(number)}]}])
        for number in range(QUESTIONS)
    ]
    assert len({len(ids) for ids in encoded}) == 1
    assert len({tuple(ids) for ids in encoded}) == QUESTIONS


def test_videos_follow_from_their_seed() -> None:
    assert (video(1, 3, 56) == video(1, 3, 56)).all()
    assert (video(1, 3, 56) != video(2, 3, 56)).any()
    frames = video(1, 3, 56)
    assert all((frames[0] != frame).any() for frame in frames[1:])


@torch.inference_mode()
def test_every_frame_matters(tmp_path: Path) -> None:
    """Attention that were uniform, or all on one token, would hide mistakes."""
    folder = checkpoint("nano", 0, tmp_path)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[5, *[model.config.video_token_id] * (3 * 4 + 1), 6, 7]])
    frames = torch.from_numpy(video(0, 3, 56)).permute(0, 3, 1, 2)[None] / 127.5 - 1
    logprobs = []
    for changed in (None, 0, 1, 2):
        pixels = frames.clone()
        if changed is not None:
            pixels[0, changed] = pixels[0, changed].flip(-1)
        logits = model(input_ids=ids, pixel_values_videos=pixels).logits[0, -1]
        logprobs.append(logits.log_softmax(-1))
    assert all((changed - logprobs[0]).abs().max() > 0.1 for changed in logprobs[1:])


def test_a_step_reads_every_weight_once(tmp_path: Path) -> None:
    config = load_checkpoint(checkpoint("nano", 0, tmp_path)).text
    matrices = 2 * (64 * 32 * (2 * 2 + 2 * 1) + 3 * 64 * 96) + 1024 * 64
    assert step_bytes(config, 1, 0, 2) == 2 * matrices
    assert kv_bytes_per_token(config, 2) == 2 * 2 * 1 * 32 * 2
    assert step_bytes(config, 16, 10, 2) - step_bytes(config, 1, 0, 2) == 160 * kv_bytes_per_token(config, 2)
    real = build_config(geometry("ov-7b"))
    gigabytes = step_bytes(decoder_config(real.text_config, tied=False), 1, 6273, 2) / 1e9
    assert 14 < gigabytes < 15  # 7.07 billion parameters without the embedding, and 0.36 GB of KV
