"""Which tokens of each item survive to the last layer: what an encode worker left, then a language worker.

Numpy and plain data only. Knows nothing about methods but that carriers stand for their frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from mmserve.methods import CARRIERS
from mmserve.request import MediaReport, TokenReport
from mmserve.workers.records import Record

MAX_REPORTED = 1 << 16  # tokens of an item or a prompt: what is said of them travels in one message

Orders = NDArray[np.signedinteger[Any]]


class Numbers(Protocol):
    """A tensor."""

    def numpy(self, *, force: bool) -> NDArray[Any]: ...


class Layout(NamedTuple):
    """How the tokens of a frame lie; as in `TokenReport`."""

    frame_tokens: int
    grids: tuple[tuple[int, int, int, int], ...]


def layout_of(tokens: int, grids: Sequence[tuple[int, int]]) -> Layout:
    """A frame, or an image: the whole of it and then its tiles, whose rows end with a newline."""
    (rows, columns), *tiles = grids
    found = [(0, rows, columns, columns)]
    found += [(rows * columns, high, wide, wide + 1) for high, wide in tiles]
    return Layout(tokens, tuple(found))


def token_report(parts: Iterable[tuple[Numbers, Numbers]], layout: Layout) -> TokenReport | None:
    """Of an item's survivors and their weights, in one part or more; None where there are too many."""
    columns = [[each.numpy(force=True) for each in part] for part in parts]
    kept, weight = (np.concatenate(column) for column in zip(*columns, strict=True))
    return None if len(kept) > MAX_REPORTED else _report(layout, kept, weight)


def media_reports(record: Record, media_tokens: Sequence[int]) -> tuple[MediaReport, ...]:
    """What is said of each item that was encoded, with the tokens that passed all layers."""
    reports = [item.report for item in record.items if item.report is not None]
    if record.prompt is None or not record.prompt.report_tokens:
        return tuple(reports)
    if record.prefilled is None or record.prefilled.survivors is None or len(reports) < len(record.items):
        return tuple(msgspec.structs.replace(report, tokens=None) for report in reports)
    orders = np.frombuffer(record.prefilled.survivors, "<i4")
    starts = _starts(record, media_tokens)
    return tuple(
        _passed(report, orders - start, record) for report, start in zip(reports, starts, strict=True)
    )


def _starts(record: Record, media_tokens: Sequence[int]) -> list[int]:
    """The order of each item's first token in the uncompressed prompt."""
    places = np.flatnonzero(np.isin(record.submitted.token_ids, media_tokens))
    before = np.cumsum([0, *(item.tokens - 1 for item in record.items)])
    return [int(place + more) for place, more in zip(places, before, strict=False)]


def _passed(report: MediaReport, places: Orders, record: Record) -> MediaReport:
    """Of the tokens that entered the model, those at `places` of the item."""
    tokens = report.tokens
    if tokens is None:
        return report
    kept, weight = np.frombuffer(tokens.kept, "<i4"), np.frombuffer(tokens.weight, "<f4")
    is_there = np.isin(kept, places)
    weight = weight[is_there]
    if record.submitted.methods.prune in CARRIERS and len(weight) < len(kept):
        weight = np.full_like(weight, tokens.frame_tokens)
    left = _report(Layout(tokens.frame_tokens, tokens.grids), kept[is_there], weight)
    return msgspec.structs.replace(report, tokens=left)


def _report(layout: Layout, kept: NDArray[Any], weight: NDArray[Any]) -> TokenReport:
    return TokenReport(
        frame_tokens=layout.frame_tokens,
        grids=layout.grids,
        kept=kept.astype("<i4").tobytes(),
        weight=weight.astype("<f4").tobytes(),
    )
