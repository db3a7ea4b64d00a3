"""Which frame of the whole prompt each row of its media shows. Knows nothing about tokens or tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]


class FrameNumbers:
    """Counts the frames of a prompt over all of its items, an image being one, as parts of items come.

    Frames of which no row is left are not counted. A newline that ends a video is of its last frame.
    """

    def __init__(self) -> None:
        self._item, self._next = -1, 0

    def of_part(self, item: int, frame: IntArray) -> IntArray:
        """The numbers of a part's rows, which are of whole frames; `frame` is as in `lease.EncodedPart`."""
        begins = (np.diff(frame, prepend=-1) != 0) & (frame >= 0)
        if item != self._item and len(frame):
            begins[0] = True
        numbers = self._next - 1 + np.cumsum(begins, dtype=np.int32)
        self._item, self._next = item, self._next + int(begins.sum())
        return numbers.astype(np.int32)
