"""Every message between the dispatcher and the workers: two closed unions and their envelopes.

Commands go down, events come up. Bulk tensors never travel in a message; a `Lease` says where they
lie. Knows nothing about sockets, processes or tensors.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mmserve.request import FinishReason, MediaRef, MediaReport, Methods
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


class ArrayHeader(_Data, frozen=True):
    """Where one array lies inside a lease's file and how to read it."""

    name: str
    dtype: str  # a name from wire.DTYPES; "bfloat16" is stored as uint16 bits
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class Lease(_Data, frozen=True):
    """Read access to named arrays in one memory-mapped file, until released or expired."""

    lease_id: str  # 128 random bits in hex
    path: str
    total_bytes: int
    arrays: tuple[ArrayHeader, ...]
    checksum: int  # crc32 of the array headers, repeated at the start of the file


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
    is_only_image: bool = True  # several images of one prompt are not cut into tiles


class EncodedItem(_Data, frozen=True):
    """One item's published embeddings: arrays "embeddings" [m, D] and "source" int32 [m].

    `source` is each row's index in the item's uncompressed run of `tokens` placeholder tokens. `key`
    (hex) is the identity of these rows: equal keys, equal rows; empty when nobody knows.
    """

    lease: Lease
    tokens: int
    kept: int
    key: str = ""


class PrefillPrompt(Command, frozen=True, tag="prefill_prompt"):
    """Run a prompt; `token_ids` has one placeholder per item.

    With `hand_off` the compressed KV is published and forgotten, otherwise the sequence stays for
    `DecodeFrom` on the same worker. `forced` are tokens already streamed by an earlier attempt. A lower
    `priority` comes earlier.
    """

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    items: tuple[EncodedItem, ...]
    sampling: SamplingParams
    methods: Methods
    forced: tuple[int, ...] = ()
    hand_off: bool = True
    salt: str = ""
    priority: int = 0


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
    """An item was opened: how many placeholder tokens it will have and at most how many are kept."""

    request_id: str
    attempt: int
    item: int
    tokens: int
    keep_bound: int


class EncodeTimes(_Data, frozen=True):
    """Milliseconds spent on one item."""

    queue: float
    decode: float
    preprocess: float
    encode: float
    prune: float
    publish: float


class MediaEncoded(Event, frozen=True, tag="media_encoded"):
    request_id: str
    attempt: int
    item: int
    encoded: EncodedItem
    cached_tokens: int
    report: MediaReport
    times: EncodeTimes


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
    cached_slots: int = 0  # of these, rows whose KV was already there
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None


class TokensDecoded(Event, frozen=True, tag="tokens_decoded"):
    """The new tokens of one decode step, one per running request."""

    tokens: tuple[Sampled, ...]


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


AnyCommand = EncodeMedia | PrefillPrompt | DecodeFrom | CancelRequest | ReleaseLease | KillWorker
AnyEvent = (
    WorkerReady
    | MediaPlanned
    | MediaEncoded
    | PromptPrefilled
    | TokensDecoded
    | RequestFailed
    | RequestPreempted
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
