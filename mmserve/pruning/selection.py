"""Choose tokens by score, equal ones by position, without asking the device how many there are.

Knows nothing about where scores and counts come from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


def top_of_rows(scores: Tensor, counts: Ints) -> Tensor:
    """Flat positions of the `counts[g]` highest of `scores` [G, N] in each row, highest first."""
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    row, rank = leading(counts, scores.shape[1], scores.device)
    return row * scores.shape[1] + ranked[row, rank]


def leading(counts: Ints, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of the first `counts[row]` entries of each row of a table `width` wide."""
    row, column = np.nonzero(np.arange(width) < counts[:, None])
    return torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)


def marked_columns(marked: Tensor, counts: Ints) -> tuple[Tensor, Tensor]:
    """Columns [G, C] of the `counts[g]` true entries of each row [G, N], and which are not padding."""
    columns = marked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    slots = torch.arange(columns.shape[1], device=marked.device)
    return columns, slots < torch.from_numpy(counts).to(marked.device)[:, None]


def marks(source: Tensor, rows: int, width: int) -> Tensor:
    """Bool [rows, width], true at flat positions `source`."""
    blank = torch.zeros(rows * width, dtype=torch.bool, device=source.device)
    return blank.index_fill(0, source, True).view(rows, width)
