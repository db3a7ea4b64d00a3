"""The phases of the recipe: what `tiny` practises, for how long, at which rate. Data only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmserve.evaluation.curriculum import Lesson
from mmserve.evaluation.tiny_pools import Supply


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`menu` is how many rows of each kind a step has on average.

    `carriers` is the share of each kind's rows under the semantic mask, `reduced` the share of the others
    whose media have lost tokens to a reduction method.
    """

    name: str
    steps: int
    peak: float
    menu: dict[str, float]
    carriers: dict[str, float]
    reduced: dict[str, float]
    supplies: dict[Lesson, Supply]
    longest_mix: int = 6
    floor: float = 0.02  # of the learning rate, at the end


LANGUAGE = Phase(
    name="language",
    steps=2000,
    peak=1e-3,
    menu={"first": 16},
    carriers={},
    reduced={},
    supplies={"first": Supply(256, 16, 8)},
)
LONG = Phase(
    name="long",
    steps=3000,
    peak=5e-4,
    menu={"clip": 6, "still": 3, "varied": 0.6, "long": 0.4, "stream": 0.3, "mixed": 4},
    carriers={"clip": 0.4, "still": 1.0, "varied": 0.4, "long": 0.4, "stream": 0.3},
    reduced={"clip": 0.4, "varied": 0.4, "long": 0.4, "mixed": 0.25},
    supplies={
        "clip": Supply(48, 24, 40),
        "image": Supply(32, 24, 24),
        "varied": Supply(16, 60, 12),
        "long": Supply(12, 100, 20),
        "stream": Supply(16, 80, 12),
    },
)
TINY_PHASES = (LANGUAGE, LONG)
DRAFT_PHASES = (
    replace(LANGUAGE, steps=1500, peak=1.5e-3),
    replace(LONG, steps=600, peak=1e-3),
)
