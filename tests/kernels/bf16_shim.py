"""Gives Triton's interpreter the values of bf16, which it otherwise computes on as uint16 bits.

For tests only. Knows nothing about our kernels.
"""

# ruff: noqa: ANN401 (the interpreter's own types are not annotated)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
Array = NDArray[Any]

_binary, _unary, _dot = Builder.binary_op, Builder.unary_op, Builder.create_dot
_cast, _fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp


def install() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    Builder.binary_op, Builder.unary_op, Builder.create_dot = _binary_op, _unary_op, _create_dot
    Builder.cast_impl, Builder.create_fp_to_fp = _cast_impl, _create_fp_to_fp


def _decode(bits: Array) -> Array:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _encode(values: Array) -> Array:
    """Round to nearest, ties to even; every NaN becomes one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _binary_op(self: Any, a: Any, b: Any, op: Callable[[Array, Array], Array]) -> Any:
    if not _is_bf16(a):
        return _binary(self, a, b, op)
    result = op(_decode(a.data), _decode(b.data))
    if result.dtype == np.bool_:
        return Handle(result, a.dtype.scalar)
    return Handle(_encode(result), tl.bfloat16)


def _unary_op(self: Any, a: Any, op: Callable[[Array], Array]) -> Any:
    return Handle(_encode(op(_decode(a.data))), tl.bfloat16) if _is_bf16(a) else _unary(self, a, op)


def _create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    wide = [Handle(_decode(side.data), tl.float32) if _is_bf16(side) else side for side in (a, b)]
    return _dot(self, *wide, d, *rest)


def _cast_impl(self: Any, source: Any, target: Any) -> Any:
    if _is_bf16(source):
        if target.scalar == tl.bfloat16:
            return Handle(source.data, tl.bfloat16)
        wide = Handle(_decode(source.data), tl.float32)
        return wide if target.scalar == tl.float32 else _cast(self, wide, target)
    if target.scalar == tl.bfloat16:
        return Handle(_encode(source.data.astype(np.float32)), tl.bfloat16)
    return _cast(self, source, target)


def _create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    kinds = (source.dtype.scalar, target.scalar)
    if tl.bfloat16 in kinds and min(kind.primitive_bitwidth for kind in kinds) >= 16:
        return _cast_impl(self, source, target)
    return _fp_to_fp(self, source, target, rounding)
