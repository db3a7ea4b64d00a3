"""The settings of a deployment: frozen dataclasses, and YAML merged strictly over their defaults.

Knows the shape and range of each setting; not which methods are registered, nor what a setting does.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from mmserve.budget import Budget
from mmserve.errors import ConfigError
from mmserve.sections import plain, section_of, settle

MiB = 1 << 20
GiB = 1 << 30

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVDtype = Literal["auto", "bf16", "fp8", "int8", "int4"]
EmbeddingStorage = Literal["auto", "int8", "fp8"]
Plane = Literal["memory", "tcp"]
WireDtype = Literal["auto", "bf16", "fp8", "int8"]
VideoBackend = Literal["pyav", "decord", "torchcodec"]


def _require(holds: bool, setting: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"Expected {setting} of {expected}, but got {found}")


def _require_positive(section: str, values: Limits | CacheSizes) -> None:
    """Every number of a section is above zero: zero would switch a protection off by accident."""
    for item in fields(values):
        value = getattr(values, item.name)
        _require(value > 0, f"{section}.{item.name}", "more than 0", value)


def _settle(section: object, path: str) -> None:
    settle(section, path, ServeConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodDefaults:
    """What a request gets when it does not say; the same fields as `request.Methods`."""

    prune: str = "none"
    # up to 1 a share of the visual tokens, above 1 tokens of each item, or "16/frame"; None: 0.25
    keep: Budget | None = None
    keep_image: Budget | None = None  # the same for images; None: as for videos
    prune_options: dict[str, Any] = field(default_factory=dict)  # settings of the method; `mmserve methods`
    prune_text_images: bool = False  # also pictures of text, which are left alone otherwise
    attention: str = "dense"
    attention_options: dict[str, Any] = field(default_factory=dict)  # settings of the pattern
    attention_dense_below: int | None = None  # slots of a prompt so far; None: the measured default
    attention_profile: str | None = None  # a file of `mmserve profile-attention`
    kv: str = "none"
    kv_budget: float | None = None  # at most 1: share of visual slots; above 1: slots per head
    kv_options: dict[str, Any] = field(default_factory=dict)  # settings of the method; `mmserve methods`
    kv_dtype: KVDtype = "auto"

    def __post_init__(self) -> None:
        _settle(self, "methods")
        budget = self.kv_budget
        _require(budget is None or budget > 0, "methods.kv_budget", "more than 0", budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneUnderLoad:
    """How far `methods.keep` falls, where a request leaves it open, as `limits.max_queued` of them wait."""

    floor: float | None = None  # smallest share; None: it stays as it is
    floors: dict[int, float] = field(default_factory=dict)  # by the priority of a request, where that differs

    def __post_init__(self) -> None:
        _settle(self, "prune_under_load")
        for name, floor in (("floor", self.floor), *self.floors.items()):
            is_share = floor is None or 0 < floor <= 1
            _require(is_share, f"prune_under_load.{name}", "above 0, at most 1", floor)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPolicy:
    """Where media may come from over HTTP. `https` and `data:` URLs are always allowed."""

    allowed_media_root: Path | None = None  # `file:` URLs and bare paths below it; None allows none
    allow_http: bool = False
    allow_private_hosts: bool = False  # loopback and private networks: for trusted clients only

    def __post_init__(self) -> None:
        _settle(self, "media")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, or all of them together, may cost. Each `max_` is inclusive.

    They are checked before the work they bound: sizes before parsing, headers before decoding.
    """

    # a request's form
    max_headers: int = 100
    max_header_bytes: int = 16 << 10
    max_body_bytes: int = 32 * MiB
    max_json_depth: int = 32
    max_messages: int = 256
    max_parts: int = 64  # content parts of one message
    max_images: int = 16  # in one request
    max_tokens: int = 4096  # generated per answer
    max_stop: int = 16
    # fetching media
    max_image_bytes: int = 20_000_000
    max_image_fetch_s: float = 5.0
    max_video_bytes: int = 100_000_000
    max_video_fetch_s: float = 30.0
    max_redirects: int = 3
    # of all requests together: bodies in memory, and as much again of media at rest for them
    max_media_bytes: int = GiB
    # one image or frame, known from the header before anything is decoded
    min_side: int = 4
    max_side: int = 16_384
    max_pixels: int = 33_500_000
    max_aspect: float = 200.0  # longer side over shorter side
    # one budget for everything with several frames: video, animated images, lists of images
    default_frames: int = 32
    max_frames: int = 2048
    max_total_pixels: int = 4_000_000_000  # summed over the sampled frames
    max_duration_s: float = 4 * 3600.0
    job_deadline_s: float = 60.0  # wall time of one decode job
    # admission
    max_running: int = 64  # requests
    max_queued: int = 16  # admitted beyond those; the next one is told to come back later

    def __post_init__(self) -> None:
        _settle(self, "limits")
        _require_positive("limits", self)
        expected = f"at most limits.max_frames ({self.max_frames})"
        _require(
            self.default_frames <= self.max_frames, "limits.default_frames", expected, self.default_frames
        )
        expected = f"at most limits.max_side ({self.max_side})"
        _require(self.min_side <= self.max_side, "limits.min_side", expected, self.min_side)
        largest = max(self.max_body_bytes, self.max_image_bytes, self.max_video_bytes)
        expected = f"at least {largest}, the largest body or media item"
        _require(self.max_media_bytes >= largest, "limits.max_media_bytes", expected, self.max_media_bytes)
        _require(self.max_tokens <= 65_536, "limits.max_tokens", "at most 65536", self.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingTiers:
    """Where an encode worker keeps embeddings beyond its own memory: nowhere, until a place is named."""

    host_bytes: int | None = None  # of a GPU worker's host, pinned
    disk_path: str | None = None  # a directory; all encode workers of a host may share it
    disk_bytes: int = 10 * GiB
    redis_url: str | None = field(default=None, repr=False)  # Redis or Valkey; it may hold a password
    redis_timeout_s: float = 0.05  # per record; who is slower is left alone for a while
    redis_expire_s: int = 86_400
    storage: EmbeddingStorage = "auto"  # on disk and in Redis: the numbers as they are, or one byte each

    def __post_init__(self) -> None:
        _settle(self, "cache.embedding_tiers")
        for name in ("host_bytes", "redis_timeout_s", "redis_expire_s"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"cache.embedding_tiers.{name}", "more than 0", value)
        least = 16 * MiB
        expected = f"at least {least}"
        _require(self.disk_bytes >= least, "cache.embedding_tiers.disk_bytes", expected, self.disk_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizes:
    """Memory of one worker for what it keeps."""

    embedding_cache_bytes: int = 256 * MiB
    remembered_media_bytes: int = 256 * MiB  # of the API process: files that clients refer to by their uuid
    kv_memory_bytes: int | None = None  # None: 1 GiB on a CPU, what is left on a GPU
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that a language worker may fill
    embedding_tiers: EmbeddingTiers = field(default_factory=EmbeddingTiers)

    def __post_init__(self) -> None:
        _settle(self, "cache")
        for name in ("embedding_cache_bytes", "kv_memory_bytes"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"cache.{name}", "more than 0", value)
        share = self.gpu_memory_utilization
        _require(0 < share <= 1, "cache.gpu_memory_utilization", "above 0, at most 1", share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How embeddings and KV get from the worker that made them to the one that needs them."""

    # files of shared memory on one host; or frames over tcp, encrypted and for known keys only
    plane: Plane = "memory"
    address: str = "127.0.0.1"  # where processes listen on the tcp plane; never the public host
    wire_dtype: WireDtype = "auto"  # of embeddings: the model's own, or fewer bits with a scale per token
    lease_ttl_s: float = 86_400.0  # how long they wait for their reader; then they are made again

    def __post_init__(self) -> None:
        _settle(self, "transfer")
        expected = "one numeric address of this machine"
        try:
            address = ipaddress.ip_address(self.address)
            is_one = not (address.is_unspecified or address.is_multicast)
        except ValueError:
            is_one = False
        _require(is_one, "transfer.address", expected, self.address)
        _require(self.lease_ttl_s > 0, "transfer.lease_ttl_s", "more than 0", self.lease_ttl_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One deployment. `ServeConfig()` serves the embedded model on loopback, one process per stage."""

    model: str = "tiny"  # "tiny", a local Hugging Face directory or a hub name
    epd: tuple[int, int, int] = (1, 1, 1)  # encode, prefill and decode workers
    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes any free port
    api_key: tuple[str, ...] | None = field(default=None, repr=False)  # any of these; None asks for none
    dtype: Dtype = "auto"
    threads: int | None = None  # per worker; None divides the cores among the workers
    # prompt rows and decodes of one step of the language model; None: 512 on a CPU, 8192 on a GPU
    max_num_batched_tokens: int | None = None
    video_backend: VideoBackend = "pyav"  # what decodes videos
    overlap: bool = True  # of a video, encode and prefill begin before all of it is decoded
    deadline_s: float = 300.0  # a request that is not done by then fails
    methods: MethodDefaults = field(default_factory=MethodDefaults)
    prune_under_load: PruneUnderLoad = field(default_factory=PruneUnderLoad)
    media: MediaPolicy = field(default_factory=MediaPolicy)
    limits: Limits = field(default_factory=Limits)
    cache: CacheSizes = field(default_factory=CacheSizes)
    transfer: Transfer = field(default_factory=Transfer)

    def __post_init__(self) -> None:
        _settle(self, "")
        _require(bool(self.model), "model", "a name or a directory", "nothing")
        _require(all(count >= 1 for count in self.epd), "epd", "three counts of 1 or more", list(self.epd))
        _require(0 <= self.port <= 65_535, "port", "0 to 65535", self.port)
        # a key's text never enters a message, so the count stands for it
        empty = self.api_key is not None and (not self.api_key or not all(self.api_key))
        _require(not empty, "api_key", "one or more keys, none of them empty", "an empty key or list")
        _require(self.threads is None or self.threads >= 1, "threads", "1 or more", self.threads)
        rows = self.max_num_batched_tokens
        _require(rows is None or rows >= 1, "max_num_batched_tokens", "1 or more", rows)
        _require(self.deadline_s > 0, "deadline_s", "more than 0", self.deadline_s)


def load_config(path: str | Path) -> ServeConfig:
    """Read a YAML file; settings it does not name keep their defaults."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Expected a readable YAML file at {path}, but got {type(error).__name__}"
        ) from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"Expected {path} to be valid YAML, but it breaks{where}") from error
    return from_mapping({} if loaded is None else loaded)


def from_mapping(mapping: Mapping[str, Any]) -> ServeConfig:
    """Merge a mapping, as YAML or `to_mapping` give it, strictly over the defaults."""
    return section_of(ServeConfig, mapping, "", ServeConfig)


def to_mapping(config: ServeConfig, *, hide_keys: bool = False) -> dict[str, Any]:
    """The whole configuration as plain data that `from_mapping` takes back; `hide_keys` for logs."""
    found = plain(config)
    assert isinstance(found, dict)
    if hide_keys and config.api_key is not None:
        found["api_key"] = ["***" for _ in config.api_key]
    if hide_keys and config.cache.embedding_tiers.redis_url is not None:
        found["cache"]["embedding_tiers"]["redis_url"] = "***"
    return found
