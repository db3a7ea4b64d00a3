"""`mmserve bench kv`: what smaller KV is worth on a decode worker, beside pages of bf16 that keep every slot.

How many requests the same memory holds, the bytes of a hand-off, and the time of a decode step, each on
synthetic KV: pages are counted and filled as a server does, but no prompt is computed. Knows nothing about
which slots a policy keeps, only how many.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from mmserve.bench.geometry import build_config, checkpoint, geometry
from mmserve.bench.pairing import Json, Metric, alternate_telling, row
from mmserve.bench.report import Tell, deliver, document
from mmserve.engine.memory import KINDS, make_runner
from mmserve.engine.pages import MAX_RUNNING
from mmserve.engine.rows import DecodeRow
from mmserve.engine.runner import Runner
from mmserve.engine.scheduler import Plan as Step
from mmserve.errors import BadRequest
from mmserve.kv.codec import QuantizedExport, quantized
from mmserve.kv.quantized import SHORT_SLOTS, places_and_pages
from mmserve.kv.store import KVExport, PageStore, page_bytes
from mmserve.kv.table import PageTable
from mmserve.messages import DECODE_HEADROOM
from mmserve.models.layout.llava_onevision import Geometry as Layout
from mmserve.models.loader import load_checkpoint, load_decoder
from mmserve.transfer import LeaseStore
from mmserve.workers.handoff import publish_kv

PAGE_SIZE = 32
TEXT_TOKENS = 24
FRAMES = 32
STEPS = 8  # in a row, of which a round's time is the mean
DTYPES = ("bf16", *KINDS)
# by type of pages and share of the visual slots, on ov-mini
MEMORY_GATES = {("int8", 1.0): 1.85, ("int4", 1.0): 3.2, ("bf16", 0.25): 3.5, ("int4", 0.25): 11.0}
STEP_GATES = {("int8", 1.0): 1 / 1.3, ("bf16", 0.1): 2.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`dtypes` of pages times `budgets`, shares of the visual slots."""

    dtypes: tuple[str, ...] = ("int8", "int4")
    budgets: tuple[float, ...] = (1.0,)
    geometry: str = "ov-mini"
    metrics: tuple[str, ...] | None = None  # None takes all
    frames: int = FRAMES
    context: int = 32_768  # slots of each sequence of a step
    batch: int = 8
    memory: int = 1 << 26
    rounds: int = 5
    threads: int | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        geometry(self.geometry)
        for name in self.dtypes:
            if name not in DTYPES:
                raise BadRequest(f"Expected a kv_dtype of {', '.join(DTYPES)}, but got {name!r}")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise BadRequest(f"Expected a budget above 0, at most 1, but got {budget:g}")
        for name in self.metrics or ():
            if name not in METRICS:
                raise BadRequest(f"Expected a metric of {', '.join(METRICS)}, but got {name!r}")

    @property
    def cells(self) -> list[tuple[str, float]]:
        found = [(dtype, budget) for dtype in self.dtypes for budget in self.budgets]
        return [cell for cell in found if cell != ("bf16", 1.0)]


def read_budgets(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(map(float, text.split(","))))
    except ValueError as error:
        raise BadRequest(
            f"Expected budgets as numbers, a comma between them, but got {text[:40]!r}"
        ) from error


@dataclass(slots=True, kw_only=True)
class Session:
    plan: Plan
    layers: int
    kv_heads: int
    head_dim: int
    visual: int  # tokens of a video
    tell: Tell
    rows: list[Json] = field(default_factory=list)

    def slots(self, budget: float) -> int:
        return TEXT_TOKENS + max(int(budget * self.visual), 1)

    def metric(
        self,
        name: str,
        cell: tuple[str, float],
        unit: str,
        gates: Mapping[tuple[str, float], float],
        more: bool,
    ) -> Metric:
        dtype, budget = cell
        label = f"{name}_{dtype}" if budget == 1 else f"{name}_{dtype}_{budget:g}"
        is_gated = self.plan.geometry == "ov-mini" and self.plan.frames == FRAMES
        gate = gates.get(cell) if is_gated else None
        return Metric(name=label, unit=unit, more_is_better=more, gate=gate)


def requests_held(session: Session, dtype: str, budget: float, memory: int) -> float:
    """How many requests a decode worker holds at once, each with room for its answer.

    They take pages until none are left; the part of a request that still fits counts as that. The worker is
    one of a deployment that keeps this budget.
    """
    slots = session.slots(budget) + DECODE_HEADROOM
    heads, d, kind = session.layers * session.kv_heads, session.head_dim, KINDS.get(dtype)
    if kind is None:
        places = MAX_RUNNING
        pages = memory // page_bytes(page_size=PAGE_SIZE, head_dim=d, dtype=torch.bfloat16)
    else:
        places, pages = places_and_pages(
            memory, MAX_RUNNING, kind, heads, PAGE_SIZE, d, torch.bfloat16, kept=budget
        )
    table, held = PageTable(session.layers, session.kv_heads, pages, PAGE_SIZE), 0
    while held < places and table.can_append(None, slots):
        table.reserve(str(held), slots)
        held += 1
    return min(held + table.free_pages / table.pages_for(slots), places)


def capacity(session: Session) -> None:
    plan, tell = session.plan, session.tell
    base = requests_held(session, "bf16", 1.0, plan.memory)
    for dtype, budget in plan.cells:
        held = requests_held(session, dtype, budget, plan.memory)
        metric = session.metric("capacity", (dtype, budget), "requests", MEMORY_GATES, True)
        session.rows.append(row(metric, [held], [base]))
        tell(f"{metric.name}: {held:.1f} requests in {plan.memory >> 20} MiB, {base:.1f} without")


def handoff(session: Session) -> None:
    """Bytes of a whole lease, with what says which slot is whose."""
    plan = session.plan
    base = _lease_bytes(_export(session, "bf16", session.slots(1.0)))
    for dtype, budget in plan.cells:
        taken = _lease_bytes(_export(session, dtype, session.slots(budget)))
        metric = session.metric("handoff", (dtype, budget), "MiB", MEMORY_GATES, False)
        session.rows.append(row(metric, [taken / 2**20], [base / 2**20]))


def step(session: Session) -> None:
    """Decode steps of a batch whose sequences have `context` slots each, or what of them is kept."""
    plan = session.plan
    folder = checkpoint(plan.geometry, 0, plan.cache_dir)
    loaded = load_checkpoint(folder, "bfloat16")
    decoder = load_decoder(loaded)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)

    def runner(dtype: str, budget: float) -> Callable[[int], float]:
        slots = TEXT_TOKENS + int(budget * (plan.context - TEXT_TOKENS))
        room = slots + STEPS * (plan.rounds + 1) + PAGE_SIZE
        one = session.layers * session.kv_heads * page_bytes(
            page_size=PAGE_SIZE, head_dim=session.head_dim, dtype=torch.bfloat16
        )  # fmt: skip
        memory = plan.batch * (-(-max(room, SHORT_SLOTS) // PAGE_SIZE) + 2) * one
        made = make_runner(
            decoder,
            kv_dtype=dtype,
            memory=memory,
            page_size=PAGE_SIZE,
            dtype=torch.bfloat16,
            device="cpu",
            prefills=False,
            decodes=True,
        )
        export = _export(session, dtype, slots)
        for name in range(plan.batch):
            made.import_(str(name), export, 0)
        steps = _Steps(made, plan.batch, slots, plan.context)
        steps.run(0)
        return steps.run

    base = runner("bf16", 1.0)
    for cell in plan.cells:
        metric = session.metric("step", cell, "ms", STEP_GATES, False)
        sides = {"with": runner(*cell), "without": base}
        found = alternate_telling(metric.name, sides, plan.rounds, session.tell)
        session.rows.append(row(metric, found["with"], found["without"]))


class _Steps:
    """Steps of one runner, one after the other; `run` gives the milliseconds of one."""

    def __init__(self, runner: Runner, batch: int, slots: int, context: int) -> None:
        self._runner, self._batch, self._next = runner, batch, context

    def run(self, number: int) -> float:
        names = tuple(str(name) for name in range(self._batch))
        started_at = time.perf_counter()
        for _ in range(STEPS):
            place, self._next = self._next, self._next + 1
            self._runner.run(Step(names, ()), {name: DecodeRow(1, place, place) for name in names})
        return (time.perf_counter() - started_at) / STEPS * 1e3


def _export(session: Session, dtype: str, slots: int) -> KVExport | QuantizedExport:
    """Random KV of one sequence."""
    heads, d = session.layers * session.kv_heads, session.head_dim
    table = PageTable(session.layers, session.kv_heads, heads * -(-slots // PAGE_SIZE), PAGE_SIZE)
    store, order = PageStore(table.num_pages, PAGE_SIZE, d, torch.bfloat16), np.arange(slots, dtype=np.int32)
    table.append("s", order, order)
    for pages in (store.k, store.v):
        pages.normal_(generator=torch.Generator().manual_seed(0))
    kind = KINDS.get(dtype)
    return store.export(table, "s") if kind is None else quantized(table, store, "s", kind)


def _lease_bytes(export: KVExport | QuantizedExport) -> int:
    with tempfile.TemporaryDirectory(prefix="mmserve-bench-") as folder, LeaseStore([Path(folder)]) as leases:
        return publish_kv(export, leases, owner="bench").total_bytes


METRICS: Mapping[str, Callable[[Session], None]] = {"capacity": capacity, "handoff": handoff, "step": step}


def run(plan: Plan, tell: Tell = lambda line: None) -> Json:
    """The whole report; `tell` gets a line whenever something is known."""
    sizes = geometry(plan.geometry).text
    session = Session(
        plan=plan,
        layers=sizes["num_hidden_layers"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        visual=Layout.from_config(build_config(geometry(plan.geometry)).to_dict()).video_tokens(plan.frames),
        tell=tell,
    )
    with torch.inference_mode():
        for name in plan.metrics or METRICS:
            METRICS[name](session)
    settings = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "cache_dir"}
    return document("kv", settings, session.rows)


def command(plan: Plan, json_out: Path | None) -> None:
    deliver(lambda tell: run(plan, tell=tell), json_out)
