"""What a worker and its decoding process say to each other over a pair of pipes.

Knows nothing about decoding or about processes.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

from mmserve.errors import WireError
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan
from mmserve.request import MediaRef

MAX_MESSAGE_BYTES = 1 << 20
HEADER = struct.Struct("<I")

_T = TypeVar("_T")


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class StartDecoder(_Message, frozen=True, tag="start_decoder"):
    """First message: where frames may be written, what the process may use; answered by `DecoderReady`."""

    directory: str
    limits: MediaLimits
    parent_pid: int


class PlanMedia(_Message, frozen=True, tag="plan_media"):
    ref: MediaRef


class DecodeMedia(_Message, frozen=True, tag="decode_media"):
    """Write the frames at these positions of the plan, one after the other, to a new file of this name."""

    ref: MediaRef
    plan: MediaPlan
    positions: tuple[int, ...]
    file_name: str


class DecoderReady(_Message, frozen=True, tag="decoder_ready"):
    pass


class MediaPlanned(_Message, frozen=True, tag="media_planned"):
    plan: MediaPlan


class MediaDecoded(_Message, frozen=True, tag="media_decoded"):
    """`positions` are those that decoded, in the order of the file's frames."""

    positions: tuple[int, ...]
    decode_ms: float


class JobFailed(_Message, frozen=True, tag="job_failed"):
    """`code` is one of `errors.ERRORS`, `message` our own words."""

    code: str
    message: str


Job = StartDecoder | PlanMedia | DecodeMedia
Reply = DecoderReady | MediaPlanned | MediaDecoded | JobFailed

_encoder = msgspec.msgpack.Encoder()
_jobs: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def pack(message: Job | Reply) -> bytes:
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    (length,) = HEADER.unpack(header)
    if length > MAX_MESSAGE_BYTES:
        raise WireError(f"Expected a message of at most {MAX_MESSAGE_BYTES} bytes, but got {length}")
    return int(length)


def unpack_job(body: bytes) -> Job:
    return _unpack(_jobs, body)


def unpack_reply(body: bytes) -> Reply:
    return _unpack(_replies, body)


def _unpack(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("Expected a message of the decoder's protocol, but got something else") from error
