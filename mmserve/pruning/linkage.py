"""Connected components of similarity graphs, on the host: which edges hold them together.

The components above a threshold are those of the strongest edges of a maximum spanning tree, and each of
those edges is one component less. Knows nothing about tokens or budgets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]


class SpanningTrees(NamedTuple):
    """One maximum spanning tree in each group; node 0 is its root, at a strength of minus infinity."""

    parent: Ints  # [G, M]
    strength: Floats  # [G, M], similarity of a node to its parent


def spanning_trees(similar: Floats) -> SpanningTrees:
    """Of symmetric similarities [G, M, M]; of equally strong edges that to the lowest node comes first."""
    groups, nodes, _ = similar.shape
    each = np.arange(groups)
    parent = np.zeros((groups, nodes), dtype=np.int64)
    strength = similar[:, 0].copy()
    nearest = strength.copy()  # to the tree, minus infinity in it
    nearest[:, 0] = strength[:, 0] = -np.inf
    outside = np.ones((groups, nodes), dtype=np.bool_)
    outside[:, 0] = False
    for _ in range(nodes - 1):
        added = nearest.argmax(axis=1)
        nearest[each, added] = -np.inf
        outside[each, added] = False
        row = similar[each, added]
        nearer = (row > nearest) & outside
        np.copyto(nearest, row, where=nearer)
        np.copyto(strength, row, where=nearer)
        np.copyto(parent, added[:, None], where=nearer)
    return SpanningTrees(parent, strength)


def components(trees: SpanningTrees, edges: int) -> Ints:
    """A node of each node's component, the same for all of it, with the `edges` strongest edges in place.

    Flat over groups [G * M]; equally strong edges go by index.
    """
    groups, nodes = trees.parent.shape
    strongest = np.argsort(-trees.strength, axis=None, kind="stable")[:edges]
    head = np.arange(groups * nodes)
    head[strongest] = (trees.parent + nodes * np.arange(groups)[:, None]).flat[strongest]
    while not np.array_equal(further := head[head], head):
        head = further
    return head
