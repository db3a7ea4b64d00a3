"""The phases of the recipe: what `tiny` practises, for how long, at which rate. Data only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmserve.evaluation.curriculum import Lesson
from mmserve.evaluation.tiny_pools import Supply


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`menu` is how many rows of each kind a step has on average.

    `carriers` is the share of each kind's rows under the semantic mask; `tower_peak` 0 keeps the tower as
    it is.
    """

    name: str
    steps: int
    peak: float
    tower_peak: float = 0.0
    menu: dict[str, float]
    carriers: dict[str, float]
    supplies: dict[Lesson, Supply]
    longest_mix: int = 6
    floor: float = 0.02  # of the learning rate, at the end


LANGUAGE = Phase(
    name="language",
    steps=2000,
    peak=1e-3,
    menu={"first": 16},
    carriers={},
    supplies={"first": Supply(256, 16, 8)},
)
JOINT = Phase(
    name="joint",
    steps=250,
    peak=5e-4,
    tower_peak=2e-4,
    menu={"clip": 7, "still": 4, "varied": 1, "mixed": 1},
    carriers={"clip": 0.5, "still": 1.0, "varied": 0.5, "mixed": 0.5},
    supplies={"clip": Supply(64, 8, 6), "varied": Supply(32, 32, 4), "image": Supply(32, 16, 4)},
    longest_mix=3,
    floor=0.4,
)
LONG = Phase(
    name="long",
    steps=2500,
    peak=4e-4,
    menu={"clip": 6, "still": 6, "varied": 0.8, "long": 0.45, "stream": 0.3, "mixed": 3},
    carriers={"clip": 0.45, "still": 1.0, "varied": 0.4, "long": 0.5, "stream": 0.3, "mixed": 0.05},
    supplies={
        "clip": Supply(32, 8, 24),
        "image": Supply(16, 16, 16),
        "varied": Supply(16, 40, 12),
        "long": Supply(16, 40, 16),
        "stream": Supply(16, 40, 12),
    },
)
TINY_PHASES = (LANGUAGE, JOINT, LONG)
DRAFT_PHASES = (
    replace(LANGUAGE, steps=1500, peak=1.5e-3),
    replace(LONG, steps=600, peak=1e-3),
)
