"""Plain data of a request and its result, as they travel between processes and out to clients.

Knows nothing about transport, tensors or HTTP.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from mmserve.budget import Budget
from mmserve.sampling import Logprob, SamplingParams

Modality = Literal["image", "video"]
Option = bool | int | float | str | None

SEGMENT_FRAMES = 8  # of a video that are decoded, encoded and published together


class _Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class MediaOptions(_Data, frozen=True):
    """How a video is sampled: `num_frames` evenly, or `fps` frames per second of its own clock.

    At most one of the two is given; with neither, up to `num_frames` 32 are sampled. Only frames shown
    from `start_s` up to, but without, `end_s` are used; `fps` keeps to the media's own clock all the same.
    `keyframes_only` samples among the frames that decode without any other. Frames of more than
    `max_pixels` are scaled down in their own shape.
    """

    num_frames: int | None = None
    fps: float | None = None
    start_s: float = 0.0
    end_s: float | None = None
    max_pixels: int | None = None
    keyframes_only: bool = False


class MediaRef(_Data, frozen=True):
    """One media item at rest on this host.

    `path` is a file a worker may open; `digest` the SHA-256 of its bytes in hex; `source` what
    reports call it (never a full URL with a query). A `.npy` file holds frames taken as sampled,
    uint8 [T, H, W, 3], and a `.framelist` pictures that are frames, both at `array_fps`.
    """

    modality: Modality
    path: str
    digest: str
    source: str
    options: MediaOptions = MediaOptions()
    array_fps: float | None = None


class Methods(_Data, frozen=True):
    """Which methods make the work smaller, by registry name, and how hard."""

    prune: str = "none"
    keep: Budget = 1.0  # what survives of each item
    keep_image: Budget | None = None  # of an image, where that differs
    # settings of the method, by name; of the second of two as "name.setting"
    prune_options: dict[str, Option] = {}
    prune_text_images: bool = False  # also pictures of text, which are left alone otherwise
    attention: str = "dense"
    attention_options: dict[str, Option] = {}  # settings of the pattern, by name
    attention_dense_below: int | None = None  # slots; None: the measured default
    attention_profile: str | None = None  # path of a file that only a deployment can name
    kv: str = "none"
    # at most 1: share of visual slots; above 1: slots per head; None: kv.base.DEFAULT_BUDGET
    kv_budget: float | None = None
    kv_options: dict[str, Option] = {}  # settings of the method, by name
    kv_dtype: str = "auto"

    @property
    def has_settings(self) -> bool:
        """Whether a method is given settings of its own, beside how much it keeps."""
        has_options = any(value for value in msgspec.structs.astuple(self) if isinstance(value, dict))
        return has_options or self.attention_profile is not None

    def __hash__(self) -> int:
        return hash((self.prune, self.keep, self.keep_image, self.kv, self.kv_budget))  # a dict has none


class TokenReport(_Data, frozen=True):
    """Which of an item's tokens survive to the last layer, numbered frame by frame.

    `weight` is how many tokens each survivor stands for. `grids` are, of the pictures that the tokens of a
    frame show, the first token, rows, columns, and how many tokens lie between the beginnings of two rows.
    """

    frame_tokens: int  # an image is one frame
    grids: tuple[tuple[int, int, int, int], ...]
    kept: bytes  # int32, little-endian, ascending
    weight: bytes  # float32, little-endian


class AttentionReport(_Data, frozen=True):
    """What a sparse pattern loses, measured against a dense pass, and the map of one head.

    `recall` is the share of the dense attention's weight on the keys that were seen, by layer, the mean over
    rows and heads. The map is side * side bytes, a cell `cell` rows high and as many keys wide: in
    `attention` the largest weight in a cell, 255 being 1 and each 51 less a tenth of that, in `seen` how much
    of the cell the pattern computes.
    """

    recall: tuple[float, ...]
    layer: int
    head: int
    chosen: str  # what the pattern does in that head, where its heads differ
    head_density: float
    head_recall: float
    cell: int
    side: int
    attention: bytes
    seen: bytes


class MediaReport(_Data, frozen=True, omit_defaults=True):
    """What was really sampled from one item."""

    source: str
    frames: int
    timestamps_s: tuple[float, ...]
    lost_frames: int
    width: int
    height: int
    guarded: bool = False  # an image of text that was to be reduced, and was left alone
    tokens: TokenReport | None = None  # where asked for, and not too much for a message


class Usage(_Data, frozen=True):
    """Counts as `interface.md` names them; `kv_bytes` after compression, `kv_bytes_uncompressed` before.

    Before compression means what enters the model: `kv_bytes_dense` is what it would be without any method.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    visual_tokens: int = 0
    visual_tokens_kept: int = 0  # that enter the language model, and whose KV no method drops in prefill
    visual_tokens_layer_mean: float = 0.0  # that are in a layer of it, mean over layers
    visual_tokens_by_layer: tuple[int, ...] = ()  # where layers differ
    visual_tokens_cached: int = 0
    kv_bytes: int = 0
    kv_bytes_uncompressed: int = 0
    kv_bytes_dense: int = 0  # of a prompt with all of its visual tokens
    attention_density: tuple[float, ...] = ()  # of each layer: share of dense attention that was computed
    attention_recall: tuple[float, ...] = ()  # the same of its weight, where that was measured


class Timings(_Data, frozen=True):
    """Milliseconds per stage; the parts from `fetch` to `other` sum to `ttft`."""

    fetch: float = 0.0
    decode: float = 0.0  # of video and images, not of text
    preprocess: float = 0.0
    encode: float = 0.0
    prune: float = 0.0
    transfer: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    other: float = 0.0
    ttft: float = 0.0
    generate: float = 0.0
    total: float = 0.0


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Chunk(_Data, frozen=True):
    """A step of a streamed answer: new text (may be empty) and the tokens behind it.

    `index` says which of the `n` answers it belongs to; `finish_reason` is set in an answer's last chunk.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    index: int = 0
    finish_reason: FinishReason | None = None


class CompletionOutput(_Data, frozen=True, kw_only=True):
    """One of the `n` answers to a prompt, as in vLLM."""

    index: int = 0
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[dict[int, Logprob], ...] | None = None


class RequestOutput(_Data, frozen=True):
    """A finished request, as in vLLM: its answers with everything that is reported about them.

    `prompt_token_ids` and `prompt_logprobs` are of the prompt with its media expanded. `usage` counts
    the prompt once and the tokens of all answers; `timings_ms` last until the end of the last one.
    """

    request_id: str
    outputs: tuple[CompletionOutput, ...]
    prompt_token_ids: tuple[int, ...]
    usage: Usage
    timings_ms: Timings
    media: tuple[MediaReport, ...]
    methods: Methods
    attention: AttentionReport | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None


class Prompt(_Data, frozen=True):
    """What a front door hands to the pipeline: tokens with one placeholder per media item, in order."""

    token_ids: tuple[int, ...]
    media: tuple[MediaRef, ...] = ()
    sampling: SamplingParams = SamplingParams()
    methods: Methods = Methods()
    salt: str = ""  # separates caches; `tenant_of` tells whose they are
    priority: int = 0  # lower comes earlier, as in vLLM
    report_tokens: bool = False  # say of every item which of its tokens survive
    report_attention: bool = False  # measure what sparse attention loses, which costs a dense pass


def tenant_of(salt: str) -> str:
    """Who pays for what is cached under a salt: its part before the first slash.

    A client may choose as many salts as it likes; all of them have the share of one tenant.
    """
    return salt.partition("/")[0]
