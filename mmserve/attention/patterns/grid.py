"""Finds the grid in what some rows look at: the stride of its lines and where they begin, by lift.

The keys are those of vision, gathered: text between frames does not move a line. Lift is the share of a
residue class in the mass, above an even share: neither small strides nor multiples win by it.
Knows nothing about rows, tiles or text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.kernels.pattern_index import residue_scores

MIN_STRIDE, MAX_STRIDE = 16, 1024
LAGS = 4  # of each head that are tried


class Grids(NamedTuple):
    """The best grid of every head, [Hq] on the host."""

    stride: NDArray[np.int64]
    first: NDArray[np.int64]  # a line is at first, first + stride, ...
    lift: NDArray[np.float32]


def frame_stride(frame: NDArray[np.int32], is_visual: NDArray[np.bool_]) -> int | None:
    """How many tokens most frames have; None without frames."""
    shown = frame[is_visual]
    if not len(shown):
        return None
    sizes = np.bincount(np.unique(shown, return_counts=True)[1])
    # of equally many the larger one: a frame that is cut off by the chunk is smaller
    return int(len(sizes) - 1 - sizes[::-1].argmax())


def near_frames(frame: int | None, longest: int) -> list[int]:
    """The stride of frames, and those beside it for tokens that separate them."""
    return [] if frame is None else [each for each in (frame, frame - 1, frame + 1) if 2 <= each <= longest]


def likely_strides(vertical: Tensor, first: int, last: int) -> Tensor:
    """Strides at which each head's mass repeats, int32 [Hq * LAGS], from its autocorrelation.

    vertical is fp32 [Hq, S]; columns outside [first, last) do not count.
    """
    inner = vertical[:, first:last]
    longest = min(MAX_STRIDE, inner.shape[1] // 2)
    if longest < MIN_STRIDE:
        return torch.empty(0, dtype=torch.int32, device=vertical.device)
    root = inner.sqrt()
    root = root - root.mean(1, keepdim=True)
    size = 1 << (2 * root.shape[1] - 1).bit_length()
    power = torch.fft.rfft(root, size).abs().square()
    repeats = torch.fft.irfft(power, size)[:, MIN_STRIDE : longest + 1]
    # a longer lag has fewer pairs
    pairs = root.shape[1] - torch.arange(MIN_STRIDE, longest + 1, device=root.device)
    best: Tensor = (repeats / pairs).topk(min(LAGS, repeats.shape[1]), 1).indices + MIN_STRIDE
    return best.flatten().int()


def clipped(vertical: Tensor, first: int, last: int) -> Tensor:
    """Column sums without single heavy keys: a line is as many columns as there are strides."""
    inner = vertical[:, first:last]
    lines = max(2, inner.shape[1] // MAX_STRIDE)
    if inner.shape[1] <= lines:
        return vertical
    return vertical.minimum(inner.topk(lines, 1).values[:, -1:])


def find_grids(
    vertical: Tensor, frame: int | None, *, first: int, last: int, is_searched: NDArray[np.bool_]
) -> Grids:
    """The grid of every head by the column sums [Hq, S] of its weights, between sink and local band.

    Heads that are not `is_searched` take the stride of frames or one beside it.
    """
    heads = len(vertical)
    vertical = clipped(vertical, first, last)
    known = near_frames(frame, min(MAX_STRIDE, max(last - first, 0) // 2))
    near = torch.tensor(known, dtype=torch.int32, device=vertical.device)
    likely = near[:0]
    if is_searched.any() and last > first:
        chosen = torch.from_numpy(np.flatnonzero(is_searched)).to(vertical.device)
        likely = likely_strides(vertical[chosen], first, last).unique()
    strides = torch.cat([near, likely])
    if not len(strides):
        nothing = np.zeros(heads, np.int64)
        return Grids(nothing + 1, nothing, np.zeros(heads, np.float32))
    found = residue_scores(vertical, strides, first=first, last=last)
    lift = found.lift.cpu().numpy().copy()
    lift[np.ix_(~is_searched, np.arange(len(strides)) >= len(known))] = -1
    best = lift.argmax(1)
    every = np.arange(heads)
    return Grids(
        strides.cpu().numpy().astype(np.int64)[best],
        found.residue.cpu().numpy().astype(np.int64)[every, best],
        lift[every, best],
    )
