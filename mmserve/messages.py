"""Every message between the dispatcher and the workers: two closed unions and their envelopes.

Commands go down, events come up. Bulk tensors never travel in a message; a `Lease` says where they
lie. Knows nothing about sockets, processes or tensors.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mmserve.lease import EncodedFrames as EncodedFrames
from mmserve.lease import EncodedPart as EncodedPart
from mmserve.lease import Lease as Lease
from mmserve.request import AttentionReport, FinishReason, MediaRef, MediaReport, Methods
from mmserve.sampling import Logprob, SamplingParams

# slots per head for answer tokens that a request is given room for at first: a longer answer takes more
# pages as it grows, and when none are left, the last request to come is preempted
DECODE_HEADROOM = 64


def answer_slots(sampling: SamplingParams, known: int = 0) -> int:
    """Slots per head for an answer of which `known` tokens exist: these, and room for the next ones."""
    return known + min(sampling.max_tokens - known, DECODE_HEADROOM)


class _Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Role(StrEnum):
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


class Credits(_Data, frozen=True):
    """What a worker can still take, absolute at the moment of sending.

    `requests` are places in its queue or batch; `slots` are KV slots per head (unused by encode).
    """

    requests: int
    slots: int = 0


# commands, dispatcher -> worker


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    pass


class EncodeMedia(Command, frozen=True, tag="encode_media"):
    """Decode, preprocess, encode, reduce and publish one media item."""

    request_id: str
    attempt: int
    item: int
    media: MediaRef
    methods: Methods
    salt: str
    report_tokens: bool = False
    is_only_image: bool = True  # several images of one prompt are not cut into tiles


class EncodeFrames(Command, frozen=True, tag="encode_frames"):
    """Help the owner of a video: encode the frames at these positions of its plan; they are not reduced."""

    request_id: str
    attempt: int
    item: int
    media: MediaRef
    positions: tuple[int, ...]


class AwaitFrames(Command, frozen=True, tag="await_frames"):
    """To the owner of a video: these frames, and no others, are being encoded elsewhere and will be sent."""

    request_id: str
    attempt: int
    item: int
    positions: tuple[int, ...]


class TakeFrames(Command, frozen=True, tag="take_frames"):
    """To the owner of a video: frames that were encoded elsewhere."""

    request_id: str
    attempt: int
    item: int
    frames: EncodedFrames


class PromptItem(_Data, frozen=True):
    """One item as far as it is encoded. `keep_bound` is the most rows it can end up with.

    Where a method drops KV during prefill, at most `lasting_bound` of them stay, with those of one frame,
    `frame_rows` at most, for as long as it is run.
    """

    parts: tuple[EncodedPart, ...]
    is_whole: bool
    keep_bound: int
    lasting_bound: int | None = None
    frame_rows: int = 0


class PrefillPrompt(Command, frozen=True, tag="prefill_prompt"):
    """Run a prompt; `token_ids` has one placeholder per item. What is missing follows by `ExtendPrompt`.

    With `hand_off` the compressed KV is published and forgotten, otherwise the sequence stays for
    `DecodeFrom` on the same worker. `forced` are tokens already streamed by an earlier attempt. A lower
    `priority` comes earlier.
    """

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    items: tuple[PromptItem, ...]
    sampling: SamplingParams
    methods: Methods
    forced: tuple[int, ...] = ()
    hand_off: bool = True
    salt: str = ""
    priority: int = 0
    report_tokens: bool = False
    report_attention: bool = False


class ExtendPrompt(Command, frozen=True, tag="extend_prompt"):
    """The next part of one item of a prompt that was sent before."""

    request_id: str
    attempt: int
    item: int
    part: EncodedPart
    is_last: bool


class DecodeFrom(Command, frozen=True, tag="decode_from"):
    """Continue after prefill: `tokens` is the first generated token or all that are forced.

    Without a lease the sequence is already on this worker. `prompt_ids` are the prompt's tokens where
    sampling penalises their repetition.
    """

    request_id: str
    attempt: int
    tokens: tuple[int, ...]
    sampling: SamplingParams
    next_order: int  # order of the first generated token: the uncompressed prompt's length
    next_position: int  # its RoPE position
    lease: Lease | None = None
    slots: int = 0  # KV slots per head in the lease, in the longest head
    prompt_ids: tuple[int, ...] = ()
    priority: int = 0
    methods: Methods = Methods()


class CancelRequest(Command, frozen=True, tag="cancel_request"):
    """Stop working on a request and give back what it holds; harmless when it is unknown."""

    request_id: str


class ReleaseLease(Command, frozen=True, tag="release_lease"):
    """The reader is done: the owner may unlink the file."""

    lease_id: str


class KillWorker(Command, frozen=True, tag="kill_worker"):
    """To the supervisor only: a worker hangs; nobody is blamed for this death."""

    worker: str


# events, worker -> dispatcher


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    pass


class WorkerReady(Event, frozen=True, tag="worker_ready"):
    """A worker has loaded its weights; `capacity` is what it could take when idle."""

    roles: tuple[Role, ...]
    pid: int
    weights_revision: str
    capacity: Credits


class MediaPlanned(Event, frozen=True, tag="media_planned"):
    """An item was opened: bounds as in `PromptItem`, and which frames are to be encoded."""

    request_id: str
    attempt: int
    item: int
    keep_bound: int
    lasting_bound: int | None = None
    frame_rows: int = 0
    missing: tuple[int, ...] = ()  # positions in a video's plan that no cache has


class EncodeTimes(_Data, frozen=True):
    """Milliseconds spent on one item."""

    queue: float
    decode: float
    preprocess: float
    encode: float
    prune: float
    publish: float


class EncodedMedia(_Data, frozen=True):
    """What is reported of an item when its last part is encoded."""

    cached_tokens: int
    report: MediaReport
    times: EncodeTimes


class MediaEncoded(Event, frozen=True, tag="media_encoded"):
    """The next part of an item; `whole` comes with the last one."""

    request_id: str
    attempt: int
    item: int
    part: EncodedPart
    whole: EncodedMedia | None


class FramesEncoded(Event, frozen=True, tag="frames_encoded"):
    """Some of what `EncodeFrames` asked for; `is_last` when nothing is left of it."""

    request_id: str
    attempt: int
    item: int
    frames: EncodedFrames
    is_last: bool


class Sampled(_Data, frozen=True):
    """One generated token; `seq` counts from 0 over the whole answer, forced tokens included."""

    request_id: str
    attempt: int
    seq: int
    token_id: int
    logprobs: dict[int, Logprob] | None = None
    finish: FinishReason | None = None


class PromptPrefilled(Event, frozen=True, tag="prompt_prefilled"):
    """The prompt's KV exists; `first` is absent when the attempt was given forced tokens.

    `prompt_logprobs` has one entry per token of the uncompressed prompt, None where there is none.
    `visual_by_layer` is how many visual rows each layer had; `visual_lasting`, where a method drops KV during
    prefill, how many of them were there at its end. `kv_bytes_dense` would be those of every token.
    """

    request_id: str
    attempt: int
    first: Sampled | None
    lease: Lease | None
    next_order: int
    next_position: int
    slots: int  # KV slots per head that a decode worker must find room for
    kv_bytes: int
    kv_bytes_uncompressed: int
    queue_ms: float
    transfer_ms: float
    prefill_ms: float
    kv_bytes_dense: int = 0
    cached_slots: int = 0  # of these, rows whose KV was already there
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    visual_by_layer: tuple[int, ...] = ()
    visual_lasting: int | None = None
    survivors: bytes | None = None  # where asked for: orders of the visual rows that last, int32
    attention_density: tuple[float, ...] = ()  # of every layer
    attention: AttentionReport | None = None  # where asked for


class TokensDecoded(Event, frozen=True, tag="tokens_decoded"):
    """The new tokens of one decode step, one per running request."""

    tokens: tuple[Sampled, ...]


class WorkCounted(Event, frozen=True, tag="work_counted"):
    """What an encode worker has done since it started, and what it holds or has waiting now, by name.

    What concerns one tier of the embedding cache is named like "hits/disk".
    """

    totals: dict[str, int]
    now: dict[str, int]


class RequestFailed(Event, frozen=True, tag="request_failed"):
    """This request cannot go on; the worker is fine."""

    request_id: str
    attempt: int
    code: str  # an errors.MMServeError code
    public_message: str


class RequestPreempted(Event, frozen=True, tag="request_preempted"):
    """Its pages went to others; prefill it again later. The worker has forgotten it."""

    request_id: str
    attempt: int


class LeaseLost(Event, frozen=True, tag="lease_lost"):
    """Embeddings or KV of this request cannot be read: make them again. The worker has forgotten it."""

    request_id: str
    attempt: int
    lease_id: str


class LeasesEvicted(Event, frozen=True, tag="leases_evicted"):
    """Their owner does not have them any more, though nobody has released them."""

    lease_ids: tuple[str, ...]


class StepStarted(Event, frozen=True, tag="step_started"):
    """Who would be blamed if the worker died now, and for how long it may stay silent."""

    requests: tuple[str, ...]
    bound_s: float


class Heartbeat(Event, frozen=True, tag="heartbeat"):
    """Sent from the work loop itself, so a hung loop is silent."""


class WorkerDied(Event, frozen=True, tag="worker_died"):
    """From the supervisor: a worker's process is gone. `signal` is 0 for a normal exit."""

    worker: str
    signal: int
    by_supervisor: bool  # then nobody is blamed


AnyCommand = (
    EncodeMedia
    | EncodeFrames
    | AwaitFrames
    | TakeFrames
    | PrefillPrompt
    | ExtendPrompt
    | DecodeFrom
    | CancelRequest
    | ReleaseLease
    | KillWorker
)
AnyEvent = (
    WorkerReady
    | MediaPlanned
    | MediaEncoded
    | FramesEncoded
    | PromptPrefilled
    | TokensDecoded
    | WorkCounted
    | RequestFailed
    | RequestPreempted
    | LeaseLost
    | LeasesEvicted
    | StepStarted
    | Heartbeat
    | WorkerDied
)


class Downward(_Data, frozen=True):
    """Envelope of a command: the dispatcher's epoch and the running number on this connection."""

    epoch: str
    number: int
    command: AnyCommand


class Upward(_Data, frozen=True):
    """Envelope of an event: credits count from the last command the worker had seen."""

    epoch: str
    seen: int
    credits: Credits
    event: AnyEvent
