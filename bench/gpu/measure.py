"""What the parts share: a session that gathers rows and checks, and time as a device counts it.

Knows nothing about attention.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from mmserve.bench.bound import copy_bandwidth
from mmserve.bench.pairing import Json, Measure, Metric, alternate, row
from mmserve.errors import MMServeError

Run = Callable[[], object]
MEASURED_S = 0.05  # a shorter run is repeated until it takes about as long
PART_S = 420.0  # after which a part starts nothing more, so that it ends within 8 minutes
CPU_PROBE_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Session:
    """One run of the command. A smoke run is the same code on very small sizes; its figures mean nothing."""

    device: torch.device
    rounds: int
    is_smoke: bool
    tell: Callable[[str], None]
    rows: list[Json] = field(default_factory=list)
    checks: list[Json] = field(default_factory=list)
    # peers that this machine does not have, and what there was no time for
    missing: list[str] = field(default_factory=list)
    _until: float = math.inf

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def start_part(self) -> None:
        self._until = time.monotonic() + PART_S

    @property
    def seconds_left(self) -> float:
        """Until the end of the part."""
        return self._until - time.monotonic()

    def has_time(self, what: str, needed_s: float = 0.0) -> bool:
        """Whether this can be measured within the part's time; if not, it counts as missing."""
        if self.seconds_left > needed_s:
            return True
        self.missing.append(f"{what}: no time left")
        self.tell(self.missing[-1])
        return False

    def check(self, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Raise MMServeError unless all are near: relative to those expected numbers that are above 1."""
        expected = expected.float()
        difference = float(((found.float() - expected).abs() / expected.abs().clamp(min=1)).max())
        # a NaN is not below anything
        if not difference <= tolerance:
            raise MMServeError(
                f"Expected {what} within {tolerance:g}, but it differs by {difference:.3g}; "
                "no speed is reported for other numbers"
            )
        entry = {"what": what, "compared": found.numel(), "max_difference": difference}
        self.checks.append(entry | {"tolerance": tolerance})
        self.tell(f"{what}: within {difference:.2g}")

    def times(
        self, name: str, sides: Mapping[str, Run], within_s: float = math.inf
    ) -> dict[str, list[float]]:
        """Seconds that every side took in every round, in turn; peers that cannot run are left out.

        Fewer rounds, but at least one, where all of them would take longer than `within_s` or the part has.
        """
        measures: dict[str, Measure] = {}
        round_s = 0.0
        for side, run in sides.items():
            try:
                measures[side], expected_s = self._measure(run)
            except RuntimeError as error:
                if side == "ours":
                    raise
                self.missing.append(f"{name}: {side}: {str(error).splitlines()[0]}")
                self.tell(self.missing[-1])
            else:
                round_s += expected_s
        most = min(within_s, max(self.seconds_left, 0.0)) / max(round_s, 1e-6)
        taken = alternate(measures, max(1, int(min(self.rounds, most))))
        for side, seconds in taken.items():
            self.tell(f"{name} {side}: {median(seconds) * 1e3:.4g} ms")
        return taken

    def _measure(self, run: Run) -> tuple[Measure, float]:
        """What times one round of a side, and about how long that takes."""
        first, repeats = timed(run, self.device), 1  # compiles
        if not self.is_smoke:
            first = timed(run, self.device)
            repeats = max(1, round(MEASURED_S / max(first, 1e-6)))

        def measure(_: int) -> float:
            return timed(run, self.device, repeats)

        return measure, first * repeats

    def add(
        self, metric: Metric, ours: Sequence[float], peer: Sequence[float] | None, **notes: object
    ) -> None:
        """A row; a smoke run passes and misses no gate."""
        if self.is_smoke:
            metric = Metric(name=metric.name, unit=metric.unit, more_is_better=metric.more_is_better)
        self.rows.append(row(metric, ours, peer, **notes))

    def bandwidth(self) -> float:
        """Bytes per second of the device's memory in its best of several copies."""
        if self.device.type == "cuda":
            return copy_bandwidth()
        source = torch.empty(CPU_PROBE_BYTES, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * CPU_PROBE_BYTES / timed(lambda: target.copy_(source), self.device)


Part = Callable[[Session], None]


def timed(run: Run, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, as the device counts them where it can."""
    if device.type != "cuda":
        started_at = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started_at) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def random(shape: Sequence[int], session: Session, seed: int) -> Tensor:
    generator = torch.Generator(session.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=session.device, dtype=session.dtype)
