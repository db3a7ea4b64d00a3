"""Bytes from another process become typed values here, or a WireError; nothing else ever happens.

Two things are read: message frames (msgspec MessagePack of a closed union) and array headers, which
say how raw bytes become a dense array. Knows nothing about sockets, files or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from mmserve.errors import MMServeError, WireError
from mmserve.lease import ArrayHeader

T = TypeVar("T")
Array: TypeAlias = npt.NDArray[np.generic]
Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_FRAME_BYTES: Final = 1 << 20
MAX_ARRAY_BYTES: Final = 1 << 36
MAX_ARRAYS: Final = 4096
MAX_DIMS: Final = 6
MAX_NAME_CHARS: Final = 128
ALIGNMENT: Final = 64

# logical name -> stored type; the last three are bit patterns that numpy cannot compute with
DTYPES: Final[dict[str, np.dtype[np.generic]]] = {
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "uint16": np.dtype("<u2"),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
}
_BIT_PATTERNS: Final = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})
_NAMES: Final = {stored: name for name, stored in DTYPES.items() if name not in _BIT_PATTERNS}


class Codec(Generic[T]):
    """Encodes and decodes one message type or closed union of message types."""

    def __init__(self, message_type: type[T] | UnionType, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._max_bytes = max_bytes

    def encode(self, message: T) -> bytes:
        frame = self._encoder.encode(message)
        # the peer's socket would drop the connection over a larger frame
        if len(frame) > self._max_bytes:
            raise WireError(f"Expected a message of at most {self._max_bytes} bytes, but got {len(frame)}")
        return frame

    def decode(self, frame: Buffer) -> T:
        if len(frame) > self._max_bytes:
            raise WireError(f"Expected a frame of at most {self._max_bytes} bytes, but got {len(frame)}")
        try:
            return self._decoder.decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"Expected a known message, but got {type(error).__name__}") from error
        except MMServeError as error:
            # structs that validate themselves, such as SamplingParams, raise their own error
            raise WireError("Expected a valid message, but a value in it is out of range") from error


class TypedArray(NamedTuple):
    """A numpy array and its logical dtype, which differs from the stored one for bit patterns."""

    array: Array
    dtype: str


class Layout(NamedTuple):
    """Where arrays lie in one buffer: headers in order, and the size of the whole."""

    headers: tuple[ArrayHeader, ...]
    total_bytes: int


def typed(array: Array | TypedArray) -> TypedArray:
    """Name the dtype of a plain array; check the name that a typed one brings."""
    if isinstance(array, TypedArray):
        if array.dtype not in DTYPES or DTYPES[array.dtype] != array.array.dtype:
            raise WireError("Expected an array stored as its dtype demands, but it is not")
        return array
    name = _NAMES.get(array.dtype)
    if name is None:
        raise WireError(f"Expected an array of one of {', '.join(DTYPES)}, but got another dtype")
    return TypedArray(array, name)


def describe(name: str, array: Array | TypedArray, offset: int = 0) -> ArrayHeader:
    """The header under which a reader finds this array again."""
    value = typed(array)
    header = ArrayHeader(name=name, dtype=value.dtype, shape=value.array.shape, offset=offset)
    checked_bytes(header)
    return header


def checked_bytes(header: ArrayHeader, max_bytes: int = MAX_ARRAY_BYTES) -> int:
    """Bytes that the header's array occupies, or WireError if it cannot be a dense array."""
    stored = DTYPES.get(header.dtype)
    if stored is None:
        raise WireError("Expected a known dtype in an array header, but got another")
    if not 1 <= len(header.name) <= MAX_NAME_CHARS:
        raise WireError(f"Expected an array name of 1 to {MAX_NAME_CHARS} characters")
    if len(header.shape) > MAX_DIMS:
        raise WireError(f"Expected at most {MAX_DIMS} dimensions, but got {len(header.shape)}")
    if header.offset < 0:
        raise WireError("Expected an offset of 0 or more, but got a negative one")
    size = bound = stored.itemsize
    for dim in header.shape:
        if dim < 0:
            raise WireError("Expected dimensions of 0 or more, but got a negative one")
        size *= dim
        # numpy multiplies the other dimensions of an empty array too
        bound *= max(dim, 1)
    if bound > max_bytes:
        raise WireError(f"Expected an array of at most {max_bytes} bytes, but its header says more")
    return size


def array_from(header: ArrayHeader, frame: Buffer, max_bytes: int = MAX_ARRAY_BYTES) -> Array:
    """A read-only view of `frame`, which must hold exactly this array; the offset is not used."""
    size = checked_bytes(header, max_bytes)
    found = memoryview(frame).nbytes
    if found != size:
        raise WireError(f"Expected {size} bytes for an array, but got {found}")
    stored = DTYPES[header.dtype]
    if size == 0:
        array: Array = np.empty(header.shape, stored)
    else:
        array = np.frombuffer(frame, stored).reshape(header.shape)
    array.flags.writeable = False
    return array


def lay_out(arrays: Mapping[str, Array | TypedArray], start: int) -> Layout:
    """Place arrays one after another from byte `start`, each at a multiple of ALIGNMENT."""
    if len(arrays) > MAX_ARRAYS:
        raise WireError(f"Expected at most {MAX_ARRAYS} arrays, but got {len(arrays)}")
    headers = []
    end = start
    for name, array in arrays.items():
        header = describe(name, array, _aligned(end))
        end = header.offset + checked_bytes(header)
        headers.append(header)
    return Layout(tuple(headers), end)


def check_layout(
    headers: Sequence[ArrayHeader], total_bytes: int, start: int, max_bytes: int = MAX_ARRAY_BYTES
) -> None:
    """Raise WireError unless `lay_out` could have produced exactly this."""
    if len(headers) > MAX_ARRAYS:
        raise WireError(f"Expected at most {MAX_ARRAYS} arrays, but got {len(headers)}")
    if len({header.name for header in headers}) != len(headers):
        raise WireError("Expected distinct array names, but one occurs twice")
    end = start
    for header in headers:
        size = checked_bytes(header, max_bytes)
        if header.offset != _aligned(end):
            raise WireError("Expected arrays side by side, but one begins elsewhere")
        end = header.offset + size
    if not end == total_bytes <= max_bytes:
        raise WireError(f"Expected {end} bytes of arrays within the limit, but got {total_bytes}")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
