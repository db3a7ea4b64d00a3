"""Leases read over a socket: their owner answers for pieces of its files, the reader checks each one.

The reader asks, so that it is never sent more than it has room for; the arrays' types, shapes and sizes come
with the lease, pieces fill them. Knows nothing about requests, or about what the arrays mean.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import zlib
from collections import deque
from collections.abc import Collection
from typing import Final, Self

import msgspec

from mmserve.errors import ConfigError, WireError
from mmserve.lease import ArrayHeader, Lease
from mmserve.queues import CurveKeys, Dealer, Router
from mmserve.transfer import LeaseGone, LeaseStore, LeaseUnreadable, check_lease
from mmserve.wire import MAX_FRAME_BYTES, Array, Codec, array_from, checked_bytes

logger = logging.getLogger(__name__)
PIECE_BYTES: Final = MAX_FRAME_BYTES - 1024
WINDOW: Final = 16  # pieces that a reader has asked for and not got yet
POLL_S: Final = 0.05
CONNECT_S: Final = 3.0  # until an owner that does not answer the call is taken for dead
SILENCE_S: Final = 30.0  # the longest that a connected owner may take for a piece


class ReadPiece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the reader: these bytes of a lease's file."""

    lease_id: str
    offset: int
    num_bytes: int


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="piece"):
    lease_id: str
    offset: int
    crc: int
    data: memoryview


class NoPiece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="no_piece"):
    """The lease is not held here, or has no such bytes."""

    lease_id: str


QUESTIONS: Codec[ReadPiece] = Codec(ReadPiece)
ANSWERS: Codec[Piece | NoPiece] = Codec(Piece | NoPiece)


class FrameServer:
    """Answers for a store's leases on a thread of its own, however busy the worker is; owns the socket."""

    def __init__(self, leases: LeaseStore, router: Router) -> None:
        self._leases = leases
        self._router = router
        self._stopping = threading.Event()
        self.dropped = 0  # frames that were no question
        self._thread = threading.Thread(target=self._run, name="mmserve-frames", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._router.wake()
        self._thread.join()
        self._router.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for reader, frame in self._router.poll(1.0):
                try:
                    question = QUESTIONS.decode(frame)
                except WireError as error:
                    self.dropped += 1
                    logger.warning("dropped a frame: %s", error)
                    continue
                # a reader that is gone needs no answer
                self._router.send(reader, ANSWERS.encode(self._answer(question)))

    def _answer(self, question: ReadPiece) -> Piece | NoPiece:
        try:
            if question.num_bytes > PIECE_BYTES:
                raise WireError(f"Expected a question for at most {PIECE_BYTES} bytes")
            data = self._leases.read(question.lease_id, question.offset, question.num_bytes)
        except (WireError, OSError):
            return NoPiece(question.lease_id)
        return Piece(question.lease_id, question.offset, zlib.crc32(data), memoryview(data))


class FrameReader:
    """Reads leases from whoever owns them. One thread uses it, and waits meanwhile."""

    def __init__(self, keys: CurveKeys) -> None:
        self._keys = keys
        self._links: dict[str, Dealer] = {}

    def open(self, lease: Lease, names: Collection[str] | None = None) -> dict[str, Array]:
        try:
            check_lease(lease)
            wanted = [header for header in lease.arrays if names is None or header.name in names]
            buffers = self._fetch(lease, wanted)
            if lease.crc is not None and names is None:
                _check_crc(lease.crc, buffers)
            return {
                header.name: array_from(header, buffer)
                for header, buffer in zip(wanted, buffers, strict=True)
            }
        except (WireError, ConfigError) as error:
            # answers to what was asked for in vain must not reach the next question
            if (link := self._links.pop(lease.endpoint, None)) is not None:
                link.close()
            logger.warning("could not read a lease: %s", error)
            raise LeaseUnreadable(lease.lease_id) from error

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _fetch(self, lease: Lease, headers: list[ArrayHeader]) -> list[bytearray]:
        buffers = [bytearray(checked_bytes(header)) for header in headers]
        left: deque[tuple[int, memoryview]] = deque()
        for header, buffer in zip(headers, buffers, strict=True):
            view = memoryview(buffer)
            for start in range(0, len(view), PIECE_BYTES):
                left.append((header.offset + start, view[start : start + PIECE_BYTES]))
        if left:
            self._fill(lease, left)
        return buffers

    def _fill(self, lease: Lease, left: deque[tuple[int, memoryview]]) -> None:
        link = self._links.get(lease.endpoint)
        if link is None:
            self._close_broken()
            name = secrets.token_hex(16).encode()
            link = Dealer(lease.endpoint, name, self._keys, breaks_on_silence=True)
            self._links[lease.endpoint] = link
        awaited: dict[int, memoryview] = {}
        was_connected = False
        heard_at = time.monotonic()
        while left or awaited:
            while left and len(awaited) < WINDOW:
                offset, target = left.popleft()
                awaited[offset] = target
                link.send(QUESTIONS.encode(ReadPiece(lease.lease_id, offset, len(target))))
            frames = link.poll(POLL_S)
            for frame in frames:
                _take(ANSWERS.decode(frame), lease, awaited)
            if frames:
                heard_at = time.monotonic()
                continue
            is_connected = link.is_connected
            silence_s = time.monotonic() - heard_at
            if was_connected > is_connected or silence_s > (SILENCE_S if is_connected else CONNECT_S):
                raise LeaseGone("Expected the owner of a lease to answer, but it does not")
            was_connected = is_connected

    def _close_broken(self) -> None:
        """A worker that is started again has another endpoint: links to dead ones would only add up."""
        for endpoint in [endpoint for endpoint, link in self._links.items() if not link.is_connected]:
            self._links.pop(endpoint).close()


def _take(answer: Piece | NoPiece, lease: Lease, awaited: dict[int, memoryview]) -> None:
    if isinstance(answer, NoPiece):
        raise LeaseGone("Expected a live lease, but its owner does not hold it")
    target = awaited.pop(answer.offset, None)
    if target is None or answer.lease_id != lease.lease_id or len(answer.data) != len(target):
        raise WireError("Expected a piece that was asked for, but got another")
    if zlib.crc32(answer.data) != answer.crc:
        raise WireError("Expected a piece that matches its checksum, but it does not")
    target[:] = answer.data


def _check_crc(expected: int, buffers: list[bytearray]) -> None:
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    if crc != expected:
        raise WireError("Expected array bytes that match their checksum, but they do not")
