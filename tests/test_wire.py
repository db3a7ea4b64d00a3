"""wire.py: hostile frames and headers end in WireError and nothing else (R2, R3)."""

from __future__ import annotations

import random
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve import messages as m
from mmserve.errors import WireError
from mmserve.lease import ArrayHeader
from mmserve.request import MediaRef, Methods
from mmserve.sampling import SamplingParams
from mmserve.wire import (
    ALIGNMENT,
    DTYPES,
    MAX_FRAME_BYTES,
    Codec,
    TypedArray,
    array_from,
    check_layout,
    checked_bytes,
    describe,
    lay_out,
)

DOWN: Codec[m.Downward] = Codec(m.Downward)
UP: Codec[m.Upward] = Codec(m.Upward)
LEASE = m.Lease(
    lease_id="0" * 32,
    path="/run/x",
    total_bytes=96,
    arrays=(ArrayHeader(name="embeddings", dtype="bfloat16", shape=(2, 8), offset=64),),
    checksum=7,
)


def down(command: m.AnyCommand) -> bytes:
    return DOWN.encode(m.Downward(epoch="épo", number=3, command=command))


def up(event: m.AnyEvent) -> bytes:
    return UP.encode(m.Upward(epoch="e", seen=3, credits=m.Credits(requests=2, slots=9), event=event))


COMMANDS = (
    down(
        m.EncodeMedia(
            request_id="r1",
            attempt=0,
            item=0,
            media=MediaRef(modality="video", path="/run/v", digest="ab" * 32, source="clip ü.mp4"),
            methods=Methods(prune="holitom", keep=0.25),
            salt="s",
        )
    ),
    down(
        m.PrefillPrompt(
            request_id="r1",
            attempt=1,
            token_ids=tuple(range(0, 4000, 40)),
            items=(
                m.PromptItem(
                    parts=(m.EncodedPart(lease=LEASE, tokens=9, kept=3),), is_whole=True, keep_bound=3
                ),
            ),
            sampling=SamplingParams(max_tokens=9, stop=("日本",)),
            methods=Methods(),
        )
    ),
    down(m.CancelRequest(request_id="r1")),
)
EVENTS = (
    up(m.WorkerReady(roles=(m.Role.ENCODE,), pid=9, weights_revision="w", capacity=m.Credits(requests=4))),
    up(m.TokensDecoded(tokens=(m.Sampled(request_id="r", attempt=0, seq=0, token_id=5),))),
    up(m.RequestFailed(request_id="r", attempt=0, code="media_error", public_message="Expected ünï")),
)


def mutated(frame: bytes, chance: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        where = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[where] = chance.randrange(256)
        elif kind == 1:
            data[where] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[where:where] = chance.randbytes(chance.randint(1, 8))
        elif len(data) > 2:
            del data[where : where + chance.randint(1, 8)]
            data = data or bytearray(b"\xc1")
    return bytes(data)


@pytest.mark.parametrize("frame", COMMANDS)
def test_commands_survive_the_wire(frame: bytes) -> None:
    assert DOWN.encode(DOWN.decode(frame)) == frame


@pytest.mark.parametrize("frame", EVENTS)
def test_events_survive_the_wire(frame: bytes) -> None:
    assert UP.encode(UP.decode(frame)) == frame


def test_mutated_frames_decode_or_raise_wire_error() -> None:
    chance = random.Random(1)
    refused = accepted = 0
    for _ in range(5000):
        for codec, frames in ((DOWN, COMMANDS), (UP, EVENTS)):
            try:
                codec.decode(mutated(chance.choice(frames), chance))
                accepted += 1
            except WireError:
                refused += 1
    assert refused > 5000
    assert accepted > 0


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa5epoch\xa2\xff\xfe",
        msgspec.msgpack.encode({"epoch": "e", "number": 1, "command": {"type": "drain"}, "more": 1}),
        msgspec.msgpack.encode({"epoch": "e", "number": 1, "command": {"type": "unknown"}}),
        b"\xc0" * (MAX_FRAME_BYTES + 1),
    ],
    ids=["empty", "reserved", "deep", "array-4g", "bytes-4g", "unicode", "extra", "tag", "oversize"],
)
def test_hostile_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        DOWN.decode(frame)


def test_value_out_of_its_range_is_a_wire_error() -> None:
    raw = msgspec.msgpack.decode(COMMANDS[1])
    raw["command"]["sampling"]["max_tokens"] = -1
    with pytest.raises(WireError, match="out of range"):
        DOWN.decode(msgspec.msgpack.encode(raw))


def test_deep_untyped_frame_is_a_wire_error() -> None:
    with pytest.raises(WireError):
        Codec[object](object).decode(b"\x91" * 100_000)


def test_oversize_message_is_not_encoded() -> None:
    with pytest.raises(WireError):
        Codec(m.CancelRequest, max_bytes=100).encode(m.CancelRequest(request_id="x" * 100))


def test_codec_takes_a_union() -> None:
    codec = Codec[m.AnyCommand](m.AnyCommand)
    command = m.CancelRequest(request_id="r")
    assert codec.decode(codec.encode(command)) == command


@pytest.mark.parametrize("dtype", DTYPES)
def test_array_survives_its_header(dtype: str) -> None:
    array = np.arange(24).astype(DTYPES[dtype]).reshape(2, 3, 4)
    header = describe("x", TypedArray(array, dtype))
    again = array_from(header, array.tobytes())
    np.testing.assert_array_equal(again, array)
    assert header.dtype == dtype
    assert not again.flags.writeable


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1, 1, 1, 1)])
def test_odd_shapes_survive(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    assert array_from(describe("x", array), array.tobytes()).shape == shape


@pytest.mark.parametrize(
    "header",
    [
        ArrayHeader(name="x", dtype="object", shape=(1,), offset=0),
        ArrayHeader(name="x", dtype="sparse", shape=(1,), offset=0),
        ArrayHeader(name="", dtype="uint8", shape=(1,), offset=0),
        ArrayHeader(name="x", dtype="uint8", shape=(-1, -4), offset=0),
        ArrayHeader(name="x", dtype="uint8", shape=(1,) * 7, offset=0),
        ArrayHeader(name="x", dtype="uint8", shape=(2**63,), offset=0),
        ArrayHeader(name="x", dtype="uint8", shape=(2**32, 2**32, 4), offset=0),
        ArrayHeader(name="x", dtype="uint8", shape=(0, 2**63), offset=0),
        ArrayHeader(name="x", dtype="uint8", shape=(4,), offset=-1),
    ],
)
def test_hostile_header_is_refused(header: ArrayHeader) -> None:
    with pytest.raises(WireError):
        checked_bytes(header)


@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_frame_of_another_length_is_refused(size: int) -> None:
    header = ArrayHeader(name="x", dtype="float32", shape=(2,), offset=0)
    with pytest.raises(WireError):
        array_from(header, bytes(size))


def test_arrays_that_cannot_travel_are_refused() -> None:
    for array in (np.array([object()]), np.zeros(2, bool), np.zeros(2, ">f4"), np.zeros((1,) * 7, "u1")):
        with pytest.raises(WireError):
            describe("x", array)
    with pytest.raises(WireError):
        describe("x", TypedArray(np.zeros(2, np.float32), "bfloat16"))


DIMS = st.integers(-2, 9) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63)])
HEADERS = st.builds(
    ArrayHeader,
    name=st.text(max_size=5),
    dtype=st.sampled_from([*DTYPES, "object", "complex64", "<f4", "V8", ""]),
    shape=st.lists(DIMS, max_size=8).map(tuple),
    offset=st.integers(-1, 300),
)


@settings(max_examples=400, deadline=None)
@given(header=HEADERS, spare=st.integers(-1, 1))
def test_header_is_refused_or_reads_exactly_its_bytes(header: ArrayHeader, spare: int) -> None:
    try:
        size = checked_bytes(header, max_bytes=1 << 20)
    except WireError:
        return
    if size + spare >= 0 and spare:
        with pytest.raises(WireError):
            array_from(header, bytes(size + spare), max_bytes=1 << 20)
    array = array_from(header, bytes(size), max_bytes=1 << 20)
    assert array.nbytes == size
    assert array.shape == header.shape


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5),
    change=st.integers(-130, 130),
    which=st.integers(0, 5),
)
def test_only_the_layout_that_was_written_is_accepted(
    shapes: list[tuple[int, ...]], change: int, which: int
) -> None:
    arrays = {f"a{i}": np.zeros(shape, np.int32) for i, shape in enumerate(shapes)}
    layout = lay_out(arrays, 64)
    check_layout(layout.headers, layout.total_bytes, 64)
    assert all(header.offset % ALIGNMENT == 0 for header in layout.headers)
    if change == 0:
        return
    headers, total_bytes = list(layout.headers), layout.total_bytes
    if which < len(headers):
        headers[which] = msgspec.structs.replace(headers[which], offset=headers[which].offset + change)
    else:
        total_bytes += change
    with pytest.raises(WireError):
        check_layout(headers, total_bytes, 64)


def test_layout_refuses_equal_names_and_too_many_arrays() -> None:
    header = describe("x", np.zeros(0, np.uint8), 64)
    with pytest.raises(WireError):
        check_layout([header, header], 64, 64)
    with pytest.raises(WireError):
        check_layout([header] * 5000, 64, 64)


def test_transport_imports_no_torch() -> None:
    code = (
        "import sys, mmserve.wire, mmserve.transfer, mmserve.queues, mmserve.rundir, mmserve.workers.process;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
