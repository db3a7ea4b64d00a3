"""Where modalities begin and end: keys gathered by modality, rows of one modality, without moving any.

The axis of an index lists the slots of vision first, in order, then those of text, so that what is
continuous inside a modality is one run of it. Knows nothing about scores, heads' patterns or kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Gathered(NamedTuple):
    """Slots of a prompt by modality."""

    slots: Ints  # [S] at each place of the axis
    before: Ints  # [S + 1] slots of vision below each slot
    visual: int

    def places(self, slots: Ints) -> Ints:
        """Where slots stand on the axis."""
        before = self.before[slots]
        is_visual = self.before[slots + 1] > before
        return np.where(is_visual, before, self.visual + slots - before).astype(np.int32)


def gather(is_visual: Flags) -> Gathered:
    before = np.zeros(len(is_visual) + 1, np.int32)
    np.cumsum(is_visual, out=before[1:])
    slots = np.concatenate([np.flatnonzero(is_visual), np.flatnonzero(~is_visual)])
    return Gathered(slots.astype(np.int32), before, int(before[-1]))


class Windows(NamedTuple):
    """What every tile sees of one modality without lines, in its own numbering; int64 [tiles].

    The keys [0, sink_stop) and [local_start, stop), and lines are looked for between them.
    """

    sink_stop: Longs
    local_start: Longs
    stop: Longs


def windows(stop: Ints, seen_first: Ints, sink: Longs, local: Longs) -> Windows:
    """Of tiles whose last row sees the keys [0, stop) and whose first row sees `seen_first` of them.

    The band is the last `local` keys that the first row sees, and all after them.
    """
    sink_stop = np.minimum(sink, stop)
    local_start = np.maximum(seen_first - local, sink_stop)
    return Windows(sink_stop, np.minimum(local_start, stop), stop.astype(np.int64))


class AllWindows(NamedTuple):
    """Windows of every tile in each group of keys; `whole` counts only where keys are one group."""

    whole: Windows
    vision: Windows
    text: Windows


def all_windows(
    gathered: Gathered, first: Ints, last: Ints, is_joint: Flags, sink: Longs, local: Longs
) -> AllWindows:
    """Of tiles of rows between the slots `first` and `last`, [tiles].

    sink and local are [tiles, 2], for keys of vision and of text; where keys are one group (`is_joint`) the
    first two numbers hold for the prompt as it lies, and its windows are cut in two.
    """
    seen_first, stop = first + 1, last + 1
    whole = windows(stop, seen_first, sink[:, 0], local[:, 0])
    vision_first, vision_stop = gathered.before[seen_first], gathered.before[stop]
    vision = windows(vision_stop, vision_first, sink[:, 0], local[:, 0])
    text = windows(stop - vision_stop, seen_first - vision_first, sink[:, 1], local[:, 1])
    cuts = [gathered.before[cut].astype(np.int64) for cut in whole]
    parts = zip(vision, text, whole, cuts, strict=True)
    found = [
        (np.where(is_joint, in_vision, own), np.where(is_joint, cut - in_vision, other))
        for own, other, cut, in_vision in parts
    ]
    return AllWindows(whole, Windows(*(each[0] for each in found)), Windows(*(each[1] for each in found)))
