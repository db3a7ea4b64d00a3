"""Geometry, tokenizer and file layout of the embedded model `tiny` and of its draft sibling.

LLaVA-OneVision checkpoints of a few million parameters. Knows nothing about training or data beyond the
vocabulary of ClipWorld.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from mmserve.evaluation.clipworld import DIRECTIONS, TEMPLATES
from mmserve.evaluation.drawing import COLOURS, SHAPES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}"
    "{%- elif part['type'] == 'video' -%}{{ '<video>\\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
IMAGE_SIDE, PATCH = 144, 12
GRID = IMAGE_SIDE // PATCH  # patches per side before pooling
POOLED = GRID // 2  # tokens per side of a video frame after pooling
EXTRA_WORDS = (
    "user assistant system Describe the video. Describe the picture. List the objects. picture clip item "
    "now before after first last moment second seconds ago since yes no none nothing moves rests static "
    "left of right of above below This is a test. What is this? What happens in the video? What do you "
    "see? Answer with one word. Options A B C D The answer is not what where when who how many much was "
    "were does do did are has have had it them they in on at by to from with and or but then than so as "
    "if only also between while until video image frame scene object"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Widths and depths of the vision tower and of the language model."""

    tower_width: int
    tower_layers: int
    width: int
    inner: int
    layers: int
    head: int


TINY = Geometry(tower_width=160, tower_layers=4, width=256, inner=640, layers=6, head=64)
DRAFT = Geometry(tower_width=96, tower_layers=3, width=128, inner=384, layers=4, head=32)


def _corpus() -> list[str]:
    """Text whose words the tokenizer should hold whole, with and without a leading space."""
    lines = []
    for kind in TEMPLATES.values():
        for text, colour, shape in product(kind, COLOURS, SHAPES):
            lines.append(text.format(colour=f"a {colour}", shape=shape, a=shape, b=shape))
    words = [*COLOURS, *SHAPES, *DIRECTIONS, "yes", "no", *EXTRA_WORDS.split()]
    lines += [w for word in words for w in (word, f" {word}", word.capitalize())] * 50
    return lines


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: every text is encodable, ClipWorld's words and digits are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024 - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def build_config(tokenizer: Tokenizer, geometry: Geometry = TINY) -> LlavaOnevisionConfig:
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    vision = SiglipVisionConfig(
        hidden_size=geometry.tower_width,
        intermediate_size=4 * geometry.tower_width,
        num_hidden_layers=geometry.tower_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=1024,
        hidden_size=geometry.width,
        intermediate_size=geometry.inner,
        num_hidden_layers=geometry.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=geometry.head,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def build_model(config: LlavaOnevisionConfig, seed: int) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    _mimetic_init(model)
    return model


@torch.no_grad()
def _mimetic_init(model: LlavaOnevisionForConditionalGeneration) -> None:
    """Start a quarter of the heads as "find what resembles me and copy it" (Trockman & Kolter 2023).

    Queries equal keys and outputs undo values, so content matching need not be discovered; without
    it, questions that bind two attributes stay on a plateau for thousands of steps. One query head of a
    group only: two that start equal get equal gradients and stay one head for ever.
    """
    config = model.config.text_config
    head = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for kv in range(0, config.num_key_value_heads, 2):
            rows = slice(kv * head, (kv + 1) * head)
            torch.nn.init.normal_(attention.k_proj.weight[rows], std=config.hidden_size**-0.5)
            torch.nn.init.normal_(attention.v_proj.weight[rows], std=config.hidden_size**-0.5)
            mine = slice(kv * group * head, (kv * group + 1) * head)
            attention.q_proj.weight[mine] = attention.k_proj.weight[rows]
            attention.o_proj.weight[:, mine] = attention.v_proj.weight[rows].T


def save_checkpoint(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write a Hugging Face directory: bf16 safetensors, configs, tokenizer, processors."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    siglip = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
    }
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {"image_token": "<image>", "video_token": "<video>"},
        },
        "preprocessor_config.json": siglip
        | {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": [[IMAGE_SIDE, IMAGE_SIDE]],
            "do_pad": True,
        },
        "video_preprocessor_config.json": siglip | {"video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": GRID * GRID,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_token": "<image>",
            "video_token": "<video>",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
