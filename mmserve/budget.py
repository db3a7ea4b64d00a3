"""How many visual tokens a method keeps: a share of them, a number for each item, or a number per frame.

Pure. Knows nothing about methods, nor where such a budget comes from.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from mmserve.errors import BadRequest

# at most 1: a share; above 1, whole: at most so many tokens of an item; "16/frame": so many for each frame
Budget = float | int | str

DEFAULT_KEEP = 0.25  # of a method that was named without saying how much it keeps

_PER_FRAME = re.compile(r"([1-9][0-9]{0,8})/frame")


def checked_keep(given: object, name: str = "keep") -> Budget:
    """The same budget in its one form; raises BadRequest."""
    if isinstance(given, str) and _PER_FRAME.fullmatch(given):
        return given
    if isinstance(given, int | float) and not isinstance(given, bool):
        if 0 < given <= 1:
            return float(given)
        if 1 < given < 2**31 and given == int(given):
            return int(given)
    shown = f"{given:g}" if isinstance(given, float) else repr(given)[:40]
    raise BadRequest(
        f"Expected {name} of above 0, at most 1, as a share of the tokens, a whole number above 1, "
        f"of each item, or one per frame such as '16/frame', but got {shown}"
    )


def read_keep(text: str, name: str = "keep") -> Budget:
    """A budget as it is written on a command line."""
    written = text.strip()
    if written.isascii() and written.isdecimal():
        return checked_keep(int(written), name)
    try:
        number = float(written)
    except ValueError:
        return checked_keep(written, name)
    # "2.0" is more likely meant as a share or a factor than as two tokens
    return checked_keep(number if number <= 1 else written, name)


def is_share(keep: Budget) -> bool:
    return isinstance(keep, float)


def keep_under_load(keep: float, floor: float, waiting: int, full: int) -> float:
    """What is kept while so many requests wait, of a queue of `full`: on a line down to `floor`.

    In hundredths, so that requests under about the same load share what is cached.
    """
    eased = keep - (keep - floor) * min(waiting / full, 1.0)
    return max(floor, min(keep, round(eased, 2)))


def share_of(keep: Budget, frames: int, tokens: int) -> float:
    """The share of `frames` x `tokens` that a budget is; an image is one frame.

    Where the item is cut into windows, their counts are rounded down one by one.
    """
    keep = checked_keep(keep)
    if isinstance(keep, float):
        return keep
    exact = (
        Fraction(int(keep.partition("/")[0]), tokens)
        if isinstance(keep, str)
        else Fraction(keep, frames * tokens)
    )
    if exact >= 1:
        return 1.0
    share = float(exact)
    # a float just below would lose a token where counts are rounded down
    while Fraction(repr(share)) < exact:
        share = math.nextafter(share, 1)
    return share
