"""What the parts share: a session that gathers rows and checks, and time as a device counts it.

Knows nothing about attention.
"""

from __future__ import annotations

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
    missing: list[str] = field(default_factory=list)  # peers that this machine does not have

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def check(self, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Raise MMServeError unless all are near."""
        difference = float((found.float() - expected.float()).abs().max())
        # a NaN is not below anything
        if not difference <= tolerance:
            raise MMServeError(
                f"Expected {what} within {tolerance:g}, but it differs by {difference:.3g}; "
                "no speed is reported for other numbers"
            )
        entry = {"what": what, "compared": found.numel(), "max_abs_difference": difference}
        self.checks.append(entry | {"tolerance": tolerance})
        self.tell(f"{what}: within {difference:.2g}")

    def times(self, name: str, sides: Mapping[str, Run]) -> dict[str, list[float]]:
        """Seconds that every side took in every round, in turn; peers that cannot run are left out."""
        measures: dict[str, Measure] = {}
        for side, run in sides.items():
            try:
                measures[side] = self._measure(run)
            except RuntimeError as error:
                if side == "ours":
                    raise
                self.missing.append(f"{name}: {side}: {str(error).splitlines()[0]}")
                self.tell(self.missing[-1])
        taken = alternate(measures, self.rounds)
        for side, seconds in taken.items():
            self.tell(f"{name} {side}: {median(seconds) * 1e3:.4g} ms")
        return taken

    def _measure(self, run: Run) -> Measure:
        run()  # compiles
        first = timed(run, self.device)
        repeats = 1 if self.is_smoke else max(1, round(MEASURED_S / max(first, 1e-6)))

        def measure(_: int) -> float:
            return timed(run, self.device, repeats)

        return measure

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
