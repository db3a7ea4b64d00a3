"""From a checkpoint directory or hub name to the two halves of a model, each with only its own weights.

Reads JSON and safetensors, nothing that can run code. Knows nothing about tokenizers or requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, PreTrainedConfig

from mmserve.encoders.base import VisionEncoder
from mmserve.encoders.siglip import SiglipEncoder
from mmserve.errors import ConfigError
from mmserve.models.decoder import DecoderConfig, TextDecoder
from mmserve.models.linear import pack_linears
from mmserve.models.resolve import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_BF16_WIDTH = 512  # below, products in float32 are as fast, and exact
FAMILIES = ("llava_onevision",)
TEXT_FAMILIES = ("qwen2", "qwen3", "llama")
# both the present key layout of transformers and the one of older checkpoints
RENAMES = (
    (re.compile(r"^(model\.)?language_model\.(model\.)?(?=embed_tokens\.|layers\.|norm\.)"), "text."),
    (re.compile(r"^((model\.)?language_model\.)?lm_head\."), "text.lm_head."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision.tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "vision.projector."),
    (re.compile(r"^(model\.)?image_newline$"), "vision.newline"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose configuration was read and accepted; weights are read by `load_…`."""

    path: Path
    config: LlavaOnevisionConfig
    text: DecoderConfig
    dtype: torch.dtype
    device: str


def load_checkpoint(path_or_name: str | Path, dtype: str = "auto", device: str = "cpu") -> Checkpoint:
    """Find a checkpoint and check that it can be served; `auto` is its own dtype where it is of use."""
    path = resolve(path_or_name)
    config = _read_config(path)
    has_head = any(name == "text.lm_head.weight" for name, _, _ in _keys(path))
    tied = config.tie_word_embeddings or (config.text_config.tie_word_embeddings and not has_head)
    text = decoder_config(config.text_config, tied=tied)
    own = config.dtype or config.text_config.dtype or torch.float32
    return Checkpoint(
        path=path,
        config=config,
        text=text,
        dtype=_automatic(own, text.hidden_size, device) if dtype == "auto" else DTYPES[dtype],
        device=device,
    )


def _automatic(own: torch.dtype, width: int, device: str) -> torch.dtype:
    """On a CPU bf16 is faster where it multiplies it natively, and only in products of some size."""
    if device != "cpu":
        return own
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return own if own is torch.bfloat16 and native and width >= MIN_BF16_WIDTH else torch.float32


def load_decoder(checkpoint: Checkpoint) -> TextDecoder:
    """The language model, ready for inference."""
    with torch.device("meta"):
        decoder = TextDecoder(checkpoint.text)
    _fill(decoder, checkpoint, "text.", TextDecoder.MERGED)
    pack_linears(decoder)
    return decoder


def load_vision(checkpoint: Checkpoint) -> VisionEncoder:
    """Vision tower and projector, ready for inference."""
    with torch.device("meta"):
        encoder = SiglipEncoder(checkpoint.config)
    _fill(encoder, checkpoint, "vision.")
    encoder.rebuild_buffers(checkpoint.device)
    return encoder


def weights_revision(path: Path | str) -> str:
    """SHA-256 over a checkpoint's configuration and weights, in hex."""
    folder = Path(path)
    digest = sha256()
    for file in [folder / "config.json", *_weight_files(folder)]:
        digest.update(f"{file.name}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def decoder_config(config: PreTrainedConfig, *, tied: bool) -> DecoderConfig:
    """Our decoder's parameters from a text config of transformers."""
    if config.model_type not in TEXT_FAMILIES:
        names = ", ".join(TEXT_FAMILIES)
        raise ConfigError(f"Expected a language model of {names}, but got {config.model_type}")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"Expected rope_type default, but got {rope['rope_type']}")
    if config.hidden_act != "silu":
        raise ConfigError(f"Expected hidden_act silu, but got {config.hidden_act}")
    if getattr(config, "sliding_window", None) is not None:
        raise ConfigError("Expected a language model without sliding windows, but got one with them")
    bias = bool(getattr(config, "attention_bias", False))
    return DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        tied=tied,
        qkv_bias=bias or config.model_type == "qwen2",
        o_bias=bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=config.model_type == "qwen3",
    )


def _read_config(path: Path) -> LlavaOnevisionConfig:
    try:
        raw: object = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise ConfigError(f"Expected a readable config.json in {path}, but there is none") from error
    except ValueError as error:
        raise ConfigError(f"Expected JSON in {path / 'config.json'}, but got something else") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"Expected an object in {path / 'config.json'}, but got something else")
    _refuse_code(raw)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"Expected a model_type of {', '.join(FAMILIES)}, but got {family}")
    try:
        config = LlavaOnevisionConfig.from_dict(raw)
    except Exception as error:  # the library validates with error types of its own
        raise ConfigError(f"Expected a valid {family} configuration in {path / 'config.json'}") from error
    if config.vision_config.model_type != "siglip_vision_model":
        raise ConfigError(f"Expected a SigLIP vision tower, but got {config.vision_config.model_type}")
    if config.vision_feature_select_strategy != "full":
        raise ConfigError(
            f"Expected vision_feature_select_strategy full, but got {config.vision_feature_select_strategy}"
        )
    return config


def _refuse_code(raw: dict[str, object]) -> None:
    """A config that names Python code to run is not served."""
    if "auto_map" in raw:
        raise ConfigError("Expected a model without code of its own, but config.json has auto_map")
    for value in raw.values():
        if isinstance(value, dict):
            _refuse_code(value)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files: those of the index where there is one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / Path(name).name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        other = sorted({file.suffix for file in path.iterdir()} & {".bin", ".pt", ".pth", ".ckpt"})
        found = f"only {', '.join(other)} files" if other else "none or not all of them"
        raise ConfigError(f"Expected safetensors weights in {path}, but found {found}")
    return files


def _keys(path: Path) -> list[tuple[str, str, Path]]:
    """(our name, name in the file, file) of every tensor that we know."""
    found = []
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                keys = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"Expected safetensors in {file}, but it is damaged") from error
        for key in keys:
            for pattern, replacement in RENAMES:
                name, matches = pattern.subn(replacement, key)
                if matches:
                    found.append((name, key, file))
                    break
    return found


def _fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    merged: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> None:
    """Read the weights that `module` has, and make it ready for inference."""
    shapes = {prefix + name: tensor.shape for name, tensor in module.state_dict().items()}
    parts = {name: _parts(name, merged) for name in shapes}
    wanted = {part for names in parts.values() for part in names}
    found: dict[str, Tensor] = {}
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, key, file in _keys(checkpoint.path):
        if name in wanted:
            by_file.setdefault(file, []).append((name, key))
    for file, names in by_file.items():
        with safe_open(file, framework="pt", device=checkpoint.device) as tensors:
            for name, key in names:
                # a copy: what stays mapped would hold the whole file in memory
                found[name] = tensors.get_tensor(key).to(checkpoint.dtype, copy=True)
    state: dict[str, Tensor] = {}
    for name, theirs in parts.items():
        pieces = [found.pop(part) for part in theirs if part in found]
        whole = _stacked(pieces) if len(pieces) == len(theirs) else None
        if whole is None or whole.shape != shapes[name]:
            raise ConfigError(
                f"Expected weight {' and '.join(theirs)} as config.json says, but it is absent or misshapen"
            )
        state[name.removeprefix(prefix)] = whole
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
    module.eval()


def _parts(name: str, merged: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The checkpoint's tensors that make up our parameter `name`."""
    for ours, theirs in merged.items():
        if f".{ours}." in name:
            return tuple(name.replace(f".{ours}.", f".{part}.") for part in theirs)
    return (name,)


def _stacked(pieces: list[Tensor]) -> Tensor | None:
    if len(pieces) == 1:
        return pieces[0]
    if any(piece.shape[1:] != pieces[0].shape[1:] for piece in pieces):
        return None
    return torch.cat(pieces)


def _file_digest(file: Path) -> str:
    # the hub's cache names each large file by its SHA-256
    stored = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", stored):
        return stored
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
