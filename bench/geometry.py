"""Named model sizes, and checkpoints with random weights of each, made once and kept in a cache.

A checkpoint is a Hugging Face directory: mmserve and its peers load the very same files. Speed needs
no trained weights, but attention must not be uniform, or mistakes would go unnoticed. Knows nothing
about benchmarks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from mmserve.errors import BadRequest
from mmserve.models.resolve import resolve

LAYOUT = 1  # raise it when the weights or files of a geometry change
SHARD_BYTES = 2 << 30
POSITIONS = 32768
ATTENTION_SCORES = 2.0  # their standard deviation: about a hundred of 6,000 keys then count
LOGITS = 3.0
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of a SigLIP tower and of the Qwen2 behind it, by the names of their configurations."""

    vision: Mapping[str, int]
    text: Mapping[str, int]
    tied: bool = True  # the output head is the embedding


_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
GEOMETRIES: Mapping[str, Geometry] = {
    # for tests of the benchmarks themselves
    "nano": Geometry(
        vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        text={
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
    ),
    # ov-7b at a quarter of its width, with fewer layers
    "ov-mini": Geometry(
        vision={
            "hidden_size": 288,
            "intermediate_size": 1076,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 384,
            "patch_size": 14,
        },
        text={
            "vocab_size": 8192,
            "hidden_size": 896,
            "intermediate_size": 4736,
            "num_hidden_layers": 6,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    # 128 frames of 300 s of 848x480 take about as long to decode as to encode and to prefill, each by one
    # thread: 2.8, 3.0 and 3.3 s of an EPYC (Zen 4). Found by CPU times: ov-mini's tower with small frames,
    # since with 196 tokens each prefill would be the longest whatever else, and layers until all were alike
    "ov-balanced": Geometry(
        vision={
            "hidden_size": 288,
            "intermediate_size": 1076,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 14,
        },
        text={
            "vocab_size": 8192,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    # llava-onevision-qwen2-0.5b-ov
    "ov-0.5b": Geometry(
        vision=_SO400M,
        text={
            "vocab_size": 152000,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    # llava-onevision-qwen2-7b-ov
    "ov-7b": Geometry(
        vision=_SO400M,
        text={
            "vocab_size": 152128,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        tied=False,
    ),
}


def geometry(name: str) -> Geometry:
    if name not in GEOMETRIES:
        raise BadRequest(f"Expected a geometry of {', '.join(GEOMETRIES)}, but got {name}")
    return GEOMETRIES[name]


def checkpoint(name: str, seed: int = 0, cache_dir: Path | None = None) -> Path:
    """The directory of a geometry's checkpoint; made when it is not there yet.

    The seed gives the same weights on every machine of a kind: a GPU's random numbers are not a CPU's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = (cache_dir or default_cache_dir()) / f"{name}-{seed}-{device}-{LAYOUT}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(geometry(name), seed, device, unfinished)
        unfinished.replace(folder)
    except OSError:
        if not folder.is_dir():  # or somebody else was quicker
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def build_config(sizes: Geometry) -> LlavaOnevisionConfig:
    """A configuration whose special tokens are those of the embedded model's tokenizer."""
    tiny = LlavaOnevisionConfig.from_pretrained(resolve("tiny"))
    side = sizes.vision["image_size"]
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**sizes.vision, vision_use_head=False),
        text_config=Qwen2Config(
            **sizes.text,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=sizes.tied,
            bos_token_id=tiny.text_config.bos_token_id,
            eos_token_id=tiny.text_config.eos_token_id,
            pad_token_id=tiny.text_config.pad_token_id,
        ),
        image_token_id=tiny.image_token_id,
        video_token_id=tiny.video_token_id,
        image_grid_pinpoints=_pinpoints(side),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=sizes.tied,
        dtype="bfloat16",
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )


def _pinpoints(side: int) -> list[list[int]]:
    sides = range(side, 6 * side + 1, side)
    return [[height, width] for height, width in product(sides, sides)]


def _write(sizes: Geometry, seed: int, device: str, folder: Path) -> None:
    config = build_config(sizes)
    config.save_pretrained(folder)
    _write_weights(config, seed, device, folder)
    tiny = resolve("tiny")
    for name in TOKENIZER_FILES:
        shutil.copy(tiny / name, folder / name)
    side = sizes.vision["image_size"]
    size = {"size": {"height": side, "width": side}}
    changes: dict[str, dict[str, object]] = {
        "tokenizer_config.json": {"model_max_length": POSITIONS},
        "preprocessor_config.json": size | {"image_grid_pinpoints": _pinpoints(side)},
        "video_preprocessor_config.json": {**size},
        "processor_config.json": {"num_image_tokens": (side // sizes.vision["patch_size"]) ** 2},
    }
    for name, changed in changes.items():
        content = json.loads((tiny / name).read_text()) | changed
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_weights(config: LlavaOnevisionConfig, seed: int, device: str, folder: Path) -> None:
    shards = list(_shard_names(config))
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: _weight(name, shape, config, seed, device).to(torch.bfloat16).cpu()
            for name, shape in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    total = sum(2 * prod(shape) for names in shards for shape in names.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _shard_names(config: LlavaOnevisionConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of every weight, tied ones once, file by file."""
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    shard: dict[str, tuple[int, ...]] = {}
    for name, weight in model.named_parameters():
        shard[name] = tuple(weight.shape)
        if sum(2 * prod(shape) for shape in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _weight(
    name: str, shape: tuple[int, ...], config: LlavaOnevisionConfig, seed: int, device: str
) -> Tensor:
    """Every activation stays near 1, whatever the size."""
    text, vision = config.text_config, config.vision_config
    is_norm = "norm" in name.rsplit(".", 2)[-2]
    if is_norm and name.endswith("weight"):
        # text embeddings are small, so that tied ones do not make a model repeat its last token
        return torch.full(shape, LOGITS / 0.6 if name == "model.language_model.norm.weight" else 1.0)
    if len(shape) == 1:
        scale = 0.1
    elif "embed_tokens" in name or "lm_head" in name:
        scale = 0.6 * text.hidden_size**-0.5
    elif "position_embedding" in name:
        scale = 0.5
    else:
        scale = prod(shape[1:]) ** -0.5
        layers = vision.num_hidden_layers if "vision_tower" in name else text.num_hidden_layers
        if "q_proj" in name or "k_proj" in name:
            scale *= ATTENTION_SCORES**0.5
        elif any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2")):
            scale *= (2 * layers) ** -0.5  # what is added to the residual stream
    # each weight has a seed of its own, so no weight depends on what was made before
    own_seed = int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:7])
    generator = torch.Generator(device).manual_seed(own_seed)
    return torch.randn(shape, generator=generator, device=device) * scale


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "mmserve" / "bench"
