"""Cut a clip into segments that save the most tokens when static positions collapse to one copy each.

HoliTom's global redundancy-aware segmentation on the host, in whole numbers. Knows only which
positions look alike in consecutive frames, nothing about embeddings or budgets of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# below every reachable gain, and far enough from the edge of int64 to be added to itself
_NEVER = -(2**60)


class Segments(NamedTuple):
    """Consecutive frame ranges that cover the clip; positions of one-frame segments are never static."""

    starts: Ints  # [S]
    stops: Ints  # [S], excluded
    static: Bools  # [S, N]

    @property
    def removed(self) -> int:
        """Tokens saved when each segment holds its static positions once."""
        return int(((self.stops - self.starts - 1) * self.static.sum(axis=1)).sum())

    @property
    def of_frame(self) -> Ints:
        """The segment of each frame, [T]."""
        return np.repeat(np.arange(len(self.starts)), self.stops - self.starts)


def run_lengths(links: Bools) -> Ints:
    """For each frame and position, how many consecutive links start there: [T - 1, N] to [T, N]."""
    runs = np.zeros((links.shape[0] + 1, links.shape[1]), dtype=np.int64)
    for t in range(links.shape[0] - 1, -1, -1):
        runs[t] = np.where(links[t], runs[t + 1] + 1, 0)
    return runs


def merge_gains(runs: Ints) -> Ints:
    """Tokens saved by one segment of frames i to j, both included, at [i, j]; j < i is never chosen."""
    frames = len(runs)
    counts = np.zeros((frames, frames), dtype=np.int64)
    np.add.at(counts, (np.arange(frames)[:, None], runs), 1)
    # static[i, w]: positions whose run from frame i covers w links
    static = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    links = np.arange(frames)[None, :] - np.arange(frames)[:, None]
    return np.where(links >= 0, links * np.take_along_axis(static, links.clip(min=0), axis=1), _NEVER)


def segment_frames(links: Bools, max_segments: int) -> Segments:
    """Best segmentation into at most `max_segments`; of equal ones, that with shorter last segments."""
    runs = run_lengths(links)
    gains = merge_gains(runs)
    starts = _best_starts(gains)
    if len(starts) > max_segments:
        starts = _best_starts_within(gains, max_segments)
    stops = np.append(starts[1:], len(runs))
    last_link = (stops - starts - 1)[:, None]
    return Segments(starts, stops, (runs[starts] >= last_link) & (last_link > 0))


def _best_starts(gains: Ints) -> Ints:
    frames = len(gains)
    best = np.zeros(frames + 1, dtype=np.int64)  # of the frames before each index
    chosen = np.zeros(frames, dtype=np.int64)
    for end in range(frames):
        totals = best[: end + 1] + gains[: end + 1, end]
        chosen[end] = end - int(totals[::-1].argmax())
        best[end + 1] = totals[chosen[end]]
    starts = [int(chosen[-1])]
    while starts[-1] > 0:
        starts.append(int(chosen[starts[-1] - 1]))
    return np.array(starts[::-1], dtype=np.int64)


def _best_starts_within(gains: Ints, max_segments: int) -> Ints:
    frames = len(gains)
    ends = np.arange(frames)
    best = np.full(frames + 1, _NEVER, dtype=np.int64)
    best[0] = 0
    chosen = np.zeros((max_segments, frames), dtype=np.int64)
    reached = np.zeros(max_segments, dtype=np.int64)
    for used in range(max_segments):
        totals = best[:-1, None] + gains  # [start, end]
        chosen[used] = frames - 1 - totals[::-1].argmax(axis=0)
        best = np.append(_NEVER, np.maximum(totals[chosen[used], ends], _NEVER))
        reached[used] = best[-1]
    used = max_segments - 1 - int(reached[::-1].argmax())
    starts, end = [], frames - 1
    for level in range(used, -1, -1):
        starts.append(int(chosen[level, end]))
        end = starts[-1] - 1
    return np.array(starts[::-1], dtype=np.int64)
