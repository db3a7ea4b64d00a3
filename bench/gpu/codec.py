"""Writing and reading quantized pages, as a share of what the memory delivers, and what they lose.

The size is that of one layer of 64 sequences of 32K tokens. Decode on such pages is in `decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmserve.bench.gpu.measure import Session, random
from mmserve.bench.pairing import Metric
from mmserve.kernels.kv_codec import (
    QuantizedPages,
    empty_pages,
    hadamard,
    load_pages,
    naive,
    store_pages,
)
from mmserve.kernels.kv_codec.pages import KeyAxis, Kind

OUTLIER_CHANNELS, OUTLIER = 32, 8.0  # of keys every so many channels are so many times larger
CHECKED_PAGES = 64
BOUND_TOLERANCE = 1.001  # of an error, in units of its bound: fp32 rounds too
LOAD_TOLERANCE = 1e-5
FP8_CAPABILITY = (8, 9)


class Codec(NamedTuple):
    """Keys scaled by channel are the layout of KIVI."""

    kind: Kind
    key_axis: KeyAxis

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.key_axis}"


CODECS = (Codec("int8", "slot"), Codec("int4", "channel"), Codec("int4", "slot"), Codec("fp8", "slot"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    pages: int = 64 * 4 * 1024
    page_size: int = 32
    width: int = 128


SMOKE = Sizes(pages=3, page_size=16, width=32)


def codecs(session: Session) -> tuple[Codec, ...]:
    """Those that this device has."""
    if session.device.type != "cuda" or torch.cuda.get_device_capability(session.device) >= FP8_CAPABILITY:
        return CODECS
    session.missing.append("fp8: needs a newer device")
    return tuple(codec for codec in CODECS if codec.kind != "fp8")


def run(session: Session) -> None:
    sizes = SMOKE if session.is_smoke else Sizes()
    shape = (sizes.pages, sizes.page_size, sizes.width)
    k, v = (random(shape, session, seed) for seed in (1, 2))
    k[..., ::OUTLIER_CHANNELS] *= OUTLIER
    bandwidth = session.bandwidth() / 1e9
    for codec in codecs(session):
        for turn in (None, hadamard):
            name = f"codec_{codec.name}" + ("_hadamard" if turn else "")
            if session.has_time(name):
                _measure(session, name, codec, k, v, turn, bandwidth)


def filled(codec: Codec, k: Tensor, v: Tensor) -> QuantizedPages:
    """Pages of k and v [pages, page_size, d], at the same places."""
    pages = empty_pages(codec.kind, *k.shape, key_axis=codec.key_axis, device=k.device)
    store_pages(pages, k, v, *_everything(k))
    return pages


def _measure(
    session: Session,
    name: str,
    codec: Codec,
    k: Tensor,
    v: Tensor,
    turn: Callable[[Tensor], Tensor] | None,
    bandwidth: float,
) -> None:
    page_ids, counts = _everything(k)
    pages = filled(codec, k, v)

    def store() -> None:
        rows = (k, v) if turn is None else (turn(k), turn(v))
        store_pages(pages, *rows, page_ids, counts)

    def load() -> tuple[Tensor, Tensor]:
        found = load_pages(pages, page_ids, k.dtype)
        return found if turn is None else (turn(found[0]), turn(found[1]))

    store()
    notes = _check(session, name, codec, pages, k[:CHECKED_PAGES], v[:CHECKED_PAGES], turn)
    rows_bytes = k.nbytes + v.nbytes
    # a rotation is a pass of its own
    moved = (rows_bytes if turn is None else 3 * rows_bytes) + _bytes(pages)
    taken = {
        "store": session.times(f"{name} store", {"ours": store})["ours"],
        "load": session.times(f"{name} load", {"ours": load})["ours"],
    }
    for what, seconds in taken.items():
        metric = Metric(name=f"{name}_{what}_vs_bandwidth", unit="GB/s", more_is_better=True)
        rates = [moved / s / 1e9 for s in seconds]
        session.add(metric, rates, [bandwidth] * len(rates), peer_is="measured copy bandwidth", **notes)


def _check(
    session: Session,
    name: str,
    codec: Codec,
    pages: QuantizedPages,
    k: Tensor,
    v: Tensor,
    turn: Callable[[Tensor], Tensor] | None,
) -> dict[str, object]:
    """Errors against their bounds, and relative to the numbers after the whole way, for the rows' notes."""
    page_ids = torch.arange(len(k), dtype=torch.int32, device=k.device)
    loaded = load_pages(pages, page_ids, torch.float32)
    notes: dict[str, object] = {}
    sides = zip(("keys", "values"), (k, v), loaded, naive.load_pages(pages, page_ids), strict=True)
    for what, rows, found, expected in sides:
        session.check(f"{name}: {what} against the oracle", found, expected, LOAD_TOLERANCE)
        stored = (rows if turn is None else turn(rows)).float()
        by_channel = what == "keys" and codec.key_axis == "channel"
        excess = (found - stored).abs() / _bound(stored, codec.kind, 1 if by_channel else 2)
        bound = torch.zeros_like(excess)
        session.check(f"{name}: error of {what} by its bound", excess, bound, BOUND_TOLERANCE)
        error = (found if turn is None else turn(found)) - rows.float()
        relative = (error.square().mean() / rows.float().square().mean()).sqrt()
        notes[f"error_of_{what}"] = float(f"{float(relative):.3g}")
    return notes


def _bound(rows: Tensor, kind: Kind, dim: int) -> Tensor:
    """The largest error of each number, as kernels/kv_codec/README.md has it; groups lie along `dim`."""
    if kind == "int4":
        return (rows.amax(dim, keepdim=True) - rows.amin(dim, keepdim=True)) / 30
    largest = rows.abs().amax(dim, keepdim=True)
    return largest / 254 if kind == "int8" else torch.maximum(rows.abs() / 16, largest / 448 / 1024)


def _everything(k: Tensor) -> tuple[Tensor, Tensor]:
    """The ids of all pages, and that they are full."""
    page_ids = torch.arange(len(k), dtype=torch.int32, device=k.device)
    return page_ids, torch.full_like(page_ids, k.shape[1])


def _bytes(pages: QuantizedPages) -> int:
    scales = pages.scales
    parts = (pages.k, pages.v, scales.k_scale, scales.v_scale, scales.k_zero, scales.v_zero)
    return sum(part.nbytes for part in parts if part is not None)
