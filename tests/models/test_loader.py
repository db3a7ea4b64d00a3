"""Loading: what is refused and why, and what of a checkpoint is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from mmserve.errors import ConfigError
from mmserve.models.loader import load_checkpoint, load_decoder, load_vision, weights_revision
from mmserve.models.resolve import EMBEDDED, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = Qwen2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=18,
        video_token_id=19,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next"}, "model_type of llava_onevision, but got llava_next"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "has auto_map"),
        ({"text_config__auto_map": {}}, "has auto_map"),
        ({"text_config__model_type": "gemma"}, "language model of qwen2, qwen3, llama, but got gemma"),
        ({"text_config__hidden_act": "gelu"}, "hidden_act silu, but got gelu"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type",
        ),
        (
            {"text_config__use_sliding_window": True, "text_config__sliding_window": 8},
            "without sliding windows",
        ),
        ({"vision_config__model_type": "clip_vision_model"}, "SigLIP vision tower"),
        ({"vision_feature_select_strategy": "default"}, "strategy full, but got default"),
        ({"text_config__hidden_size": "wide"}, "Expected a valid llava_onevision configuration"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in caught.value.public_message


def test_only_safetensors_are_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"safetensors weights in .*, but found only \.bin files"):
        load_checkpoint(folder)


def test_damaged_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="it is damaged"):
        load_checkpoint(folder)


def test_a_missing_or_misshapen_weight_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (key,) = (name for name in tensors if name.endswith("mlp.up_proj.weight"))
    for changed in ({key: torch.zeros(2, 2)}, {}):
        save_file({k: v for k, v in tensors.items() if k != key} | changed, file)
        with pytest.raises(ConfigError, match=r"weight text\.layers\.0\.mlp\.up_proj\.weight"):
            load_decoder(load_checkpoint(folder))
    load_vision(load_checkpoint(folder))


def test_sharded_checkpoints_load_what_the_index_names(folder: Path) -> None:
    file = folder / "model.safetensors"
    expected = load_decoder(load_checkpoint(folder)).state_dict()
    tensors = load_file(file)
    file.unlink()
    halves = {"one.safetensors": sorted(tensors)[::2], "two.safetensors": sorted(tensors)[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, folder / "another.safetensors")
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_decoder(load_checkpoint(folder)).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    (folder / "two.safetensors").unlink()
    with pytest.raises(ConfigError, match="not all of them"):
        load_checkpoint(folder)


def test_weights_take_the_asked_type_and_need_no_gradient(folder: Path) -> None:
    checkpoint = load_checkpoint(folder, "bfloat16")
    decoder = load_decoder(checkpoint)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in decoder.parameters())
    assert load_checkpoint(folder).dtype == torch.float32
    vision = load_vision(checkpoint)
    encoded = vision.frames(vision.features(torch.zeros(1, 3, 8, 8)))
    assert encoded.embeddings.dtype == torch.bfloat16
    assert encoded.saliency.dtype == torch.float32


def test_an_absent_head_is_the_embedding_when_the_text_config_ties_them(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k}, file)
    with pytest.raises(ConfigError, match=r"text\.lm_head\.weight"):
        load_decoder(load_checkpoint(folder))
    edit(folder, text_config__tie_word_embeddings=True)
    assert load_decoder(load_checkpoint(folder)).lm_head is None


def test_the_revision_follows_weights_and_configuration(folder: Path) -> None:
    first = weights_revision(folder)
    assert len(first) == 64
    assert weights_revision(str(folder)) == first
    edit(folder, vision_feature_layer=-2)
    second = weights_revision(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[min(tensors)] += 1
    save_file(tensors, folder / "model.safetensors")
    assert len({first, second, weights_revision(folder)}) == 3


def test_names_resolve_to_directories(folder: Path) -> None:
    assert resolve(str(folder)) == folder
    assert resolve("tiny") == EMBEDDED["tiny"]
    for name in ("nowhere", "../x/y", "https://host/model", "a/b/c", "-x/y"):
        with pytest.raises(ConfigError, match="a model directory, a hub name or tiny"):
            resolve(name)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_directory_without_a_usable_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="Expected"):
        load_checkpoint(tmp_path)
