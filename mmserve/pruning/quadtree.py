"""Quadtrees over the token grids of a frame: which node lies where, and which nodes overlap.

Nodes are numbered level by level, the tokens themselves first. Knows nothing about embeddings.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Grids = tuple[tuple[int, int], ...]


class Quadtree(NamedTuple):
    """A tree over N tokens with K nodes; up to four nodes, 2 x 2 in the picture, have one parent."""

    levels: tuple[
        Ints, ...
    ]  # above the tokens: the parts [n, 4] of each node by place in the level below, or -1
    parent: Ints  # [K], -1 for the root
    children: Ints  # [K], how many; tokens have none
    first: Ints  # [K], the node's first token

    def ancestors(self, distance: int) -> tuple[Ints, Ints]:
        """The nodes that have an ancestor so many levels up, and that ancestor of each."""
        node = above = np.arange(len(self.parent))
        for _ in range(distance):
            above = self.parent[above]
            node, above = node[above >= 0], above[above >= 0]
        return node, above

    def overlaps(self) -> tuple[Ints, Ints]:
        """All pairs of nodes that share tokens, in order."""
        down = [self.ancestors(distance) for distance in range(len(self.levels) + 1)]
        up = [(above, node) for node, above in down[1:]]
        first, second = (np.concatenate(side) for side in zip(*down, *up, strict=True))
        order = np.lexsort((second, first))
        return first[order], second[order]


def grids_of(tokens: int, grids: Grids | None) -> Grids:
    """The grids of a frame; where they are not known, a square, or else one row."""
    if grids is None:
        side = math.isqrt(tokens)
        return ((side, side),) if side**2 == tokens else ((1, tokens),)
    assert sum(rows * columns for rows, columns in grids) == tokens, f"Expected {tokens} tokens, got {grids}"
    return grids


@lru_cache(maxsize=64)
def quadtree(grids: Grids) -> Quadtree:
    """The tree over grids whose tokens follow one another; what is left of each grid is joined at last."""
    shapes = np.array(grids)
    sizes = [int(shapes.prod(axis=1).sum())]
    levels = []
    while sizes[-1] > 1:
        if sizes[-1] == len(shapes):
            shapes = np.array([(1, len(shapes))])
        parts = np.split(np.arange(sizes[-1]), shapes.prod(axis=1).cumsum()[:-1])
        levels.append(
            np.concatenate([_fours(part, *shape) for part, shape in zip(parts, shapes, strict=True)])
        )
        sizes.append(len(levels[-1]))
        shapes = -(-shapes // 2)

    total = sum(sizes)
    parent, first = np.full(total, -1), np.arange(total)
    above = 0
    for size, table in zip(sizes, levels, strict=False):
        below, above = above, above + size
        nodes = np.arange(above, above + len(table))
        parent[below + table[table >= 0]] = np.repeat(nodes, (table >= 0).sum(axis=1))
        first[nodes] = first[below + table[:, 0]]
    return Quadtree(tuple(levels), parent, np.bincount(parent[parent >= 0], minlength=total), first)


def _fours(nodes: Ints, rows: int, columns: int) -> Ints:
    """Nodes of a grid 2 x 2 at a time, the existing ones first, [n, 4]."""
    grid = np.full((rows + rows % 2, columns + columns % 2), -1)
    grid[:rows, :columns] = nodes.reshape(rows, columns)
    fours = grid.reshape(len(grid) // 2, 2, -1, 2).swapaxes(1, 2).reshape(-1, 4)
    return np.take_along_axis(fours, np.argsort(fours < 0, axis=1, kind="stable"), axis=1)
