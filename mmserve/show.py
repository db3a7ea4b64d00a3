"""`mmserve ask --show-tokens` and `--show-attention`: what was left of each item, and what a head attends to.

Decodes some of the frames once more for the first. Knows nothing about models or methods.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmserve.conversation import MediaPart, parse
from mmserve.errors import BadRequest
from mmserve.media.fetch import Fetcher
from mmserve.media.heatmap import Map, draw_map
from mmserve.media.intake import Intake
from mmserve.media.overlay import Panel, draw
from mmserve.media.pool import SandboxPool
from mmserve.request import MediaOptions, MediaReport, RequestOutput, TokenReport

MAX_PANELS = 32
KINDS = (".png", ".jpg", ".jpeg", ".webp")


class _Frame(NamedTuple):
    item: int
    number: int  # among those that were encoded


def check_target(target: Path) -> None:
    """Raise BadRequest where no picture can be written."""
    if target.suffix.lower() not in KINDS or not target.resolve().parent.is_dir():
        raise BadRequest(
            f"Expected a file ending with {', '.join(KINDS)} in a folder that exists, but got {target}"
        )


def show_tokens(
    messages: Sequence[Mapping[str, Any]], options: MediaOptions, media: Sequence[MediaReport], target: Path
) -> None:
    """Write the picture for a conversation that was answered; at most `MAX_PANELS` frames, evenly spread."""
    tokens = [report.tokens for report in media]
    if not tokens or None in tokens:
        raise BadRequest(
            "Expected images and videos of fewer tokens to show, but nothing was reported of them"
        )
    reports = [report for report in tokens if report is not None]
    shown = _evenly(
        [_Frame(item, number) for item, report in enumerate(media) for number in range(report.frames)]
    )
    pictures = _decoded(parse(messages, options=options, on_this_host=True).media, media, shown)
    spans = [report.frame_tokens * counted.frames for report, counted in zip(reports, media, strict=True)]
    firsts = [sum(spans[:item]) for item in range(len(spans))]
    weights = {
        first + token: weight
        for first, report in zip(firsts, reports, strict=True)
        for token, weight in _survivors(report)
    }
    panels = []
    for frame in shown:
        report = reports[frame.item]
        first = firsts[frame.item] + frame.number * report.frame_tokens
        for start, rows, columns, stride in report.grids:
            caption = _caption(media[frame.item], frame.number, is_whole=start == 0 and len(report.grids) > 1)
            panels.append(Panel(pictures[frame], first + start, (rows, columns), stride, caption))
    draw(panels, weights).save(target)


def show_attention(done: RequestOutput, target: Path) -> None:
    """Write the map of one head of an answered conversation, and what the pattern sees of it."""
    found, method = done.attention, done.methods.attention
    if found is None:
        raise BadRequest(
            f"Expected attention to show, but nothing is reported of it with prune {done.methods.prune}"
        )
    attention, seen = (
        np.frombuffer(cells, np.uint8).reshape(found.side, found.side)
        for cells in (found.attention, found.seen)
    )
    density = done.usage.attention_density
    chosen = f" ({found.chosen})" if found.chosen else ""
    lines = (
        f"{method}{chosen}, layer {found.layer}, head {found.head}: "
        f"density {100 * found.head_density:.1f} %, recall {100 * found.head_recall:.1f} %",
        f"all layers: density {_percents(density)}, recall {_percents(found.recall)}",
        f"one cell is {found.cell} x {found.cell} tokens; rows go down, keys to the right",
    )
    captions = ("largest weight in a cell, 0.00001 to 1", f"what {method} computes of it")
    draw_map(Map(attention, seen), captions, lines).save(target)


def _percents(shares: Sequence[float]) -> str:
    mean = 100 * sum(shares) / max(len(shares), 1)
    return f"{mean:.1f} % ({100 * min(shares, default=0):.0f} to {100 * max(shares, default=0):.0f})"


def _evenly(frames: Sequence[_Frame]) -> list[_Frame]:
    count = min(len(frames), MAX_PANELS)
    return [frames[(2 * place + 1) * len(frames) // (2 * count)] for place in range(count)]


def _decoded(
    parts: Sequence[MediaPart], media: Sequence[MediaReport], shown: Sequence[_Frame]
) -> dict[_Frame, NDArray[np.uint8]]:
    """The pictures; the same plan gives the same frames."""
    found: dict[_Frame, NDArray[np.uint8]] = {}
    with tempfile.TemporaryDirectory(prefix="mmserve-show-") as folder:
        intake, sandbox = Intake(Fetcher(directory=folder), 1), SandboxPool(folder, processes=1)
        try:
            for item in dict.fromkeys(frame.item for frame in shown):
                ref = intake.resolve(parts[item])
                plan = sandbox.plan(ref)
                there = [
                    place for place, time_s in enumerate(plan.times_s) if time_s in media[item].timestamps_s
                ]
                wanted = {there[frame.number]: frame for frame in shown if frame.item == item}
                decoded = sandbox.decode(ref, plan, sorted(wanted))
                pictures = zip(decoded.positions, decoded.frames, strict=True)
                found |= {wanted[place]: picture for place, picture in pictures}
        finally:
            sandbox.close()
    return found


def _survivors(report: TokenReport) -> list[tuple[int, float]]:
    kept, weight = np.frombuffer(report.kept, "<i4"), np.frombuffer(report.weight, "<f4")
    return list(zip(kept.tolist(), weight.tolist(), strict=True))


def _caption(report: MediaReport, number: int, *, is_whole: bool) -> str:
    guarded = ", left alone" if report.guarded else ""
    if len(report.timestamps_s) > 1:
        return f"{report.timestamps_s[number]:.2f} s"
    return f"{Path(report.source).name[:24]}{', overview' if is_whole else ''}{guarded}"
