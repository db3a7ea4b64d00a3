"""schedule: what holds for every plan, and that everything ends when plans are carried out."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.engine.scheduler import Decoding, EngineState, Plan, Prefilling, Waiting, schedule

SMALL = st.integers(0, 6)


@st.composite
def states(draw: st.DrawFn) -> EngineState:
    def who(kind: str, number: int) -> tuple[str, int, int]:
        return f"{kind}{number}", draw(st.integers(0, 2)), draw(st.integers(0, 9))

    def several(most: int) -> range:
        return range(draw(st.integers(0, most)))

    prefilling = []
    for number in several(4):
        done = draw(st.integers(0, 20))
        total = done + draw(st.integers(0, 20))
        prefilling.append(Prefilling(*who("p", number), done, total, draw(SMALL)))
    return EngineState(
        waiting=tuple(
            Waiting(*who("w", n), (done := draw(SMALL)), done + draw(st.integers(0, 20)), draw(SMALL))
            for n in several(5)
        ),
        prefilling=tuple(prefilling),
        decoding=tuple(Decoding(*who("d", n), draw(st.integers(0, 2)), draw(SMALL)) for n in several(5)),
        free_pages=draw(st.integers(0, 12)),
        places=draw(st.integers(1, 12)),
        token_budget=draw(st.integers(1, 40)),
    )


Running = Prefilling | Decoding


def order(sequence: Waiting | Running) -> tuple[int, int, str]:
    return sequence.priority, sequence.arrived, sequence.sequence


def running_of(state: EngineState) -> list[Running]:
    running: list[Running] = [*state.prefilling, *state.decoding]
    return sorted(running, key=order)


def admitted_of(state: EngineState, plan: Plan) -> list[Waiting]:
    return sorted((w for w in state.waiting if w.sequence in plan.admit), key=order)


def spent(state: EngineState, plan: Plan) -> int:
    """Pages that a plan takes, whoever gives them."""
    grown = sum(d.grow for d in state.decoding if d.sequence in plan.decodes)
    return grown + sum(prompt.pages for prompt in admitted_of(state, plan))


def check_pages_and_places(state: EngineState, plan: Plan) -> None:
    running = running_of(state)
    given_back = sum(r.pages for r in running if r.sequence in plan.preempt)
    assert spent(state, plan) <= state.free_pages + given_back
    if plan.admit:
        assert len(running) - len(plan.preempt) + len(plan.admit) <= state.places


def check_rows(state: EngineState, plan: Plan) -> None:
    left = max(state.token_budget - len(plan.decodes), 1)
    assert sum(chunk.stop - chunk.start for chunk in plan.chunks) <= left
    spans = {p.sequence: (p.done, p.ready) for p in state.prefilling}
    spans |= {w.sequence: (w.done, w.ready) for w in state.waiting if w.sequence in plan.admit}
    assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
    for chunk in plan.chunks:
        start, stop = spans[chunk.sequence]
        assert chunk.start == start < chunk.stop <= stop
        assert chunk.sequence not in plan.preempt
    # only the last one may stop short of its prompt's end, and only because the budget ends
    assert all(chunk.stop == spans[chunk.sequence][1] for chunk in plan.chunks[:-1])
    with_rows = {w.sequence for w in state.waiting if w.ready > w.done}
    assert {chunk.sequence for chunk in plan.chunks} >= with_rows.intersection(plan.admit)


def check_decodes(state: EngineState, plan: Plan) -> None:
    """Every decode that stays advances, unless it is the only one left and has no page to grow into."""
    names = [d.sequence for d in state.decoding]
    assert list(plan.decodes) == [name for name in names if name in plan.decodes]
    stalled = set(names) - set(plan.decodes) - set(plan.preempt)
    if stalled:
        first = running_of(state)[0]
        assert stalled == {first.sequence}
        assert len(plan.preempt) == len(running_of(state)) - 1


def check_preemption(state: EngineState, plan: Plan) -> None:
    """The last in order go, no more than are needed, and never the first one for an equal."""
    running = running_of(state)
    kept = len(running) - len(plan.preempt)
    assert list(plan.preempt) == [r.sequence for r in reversed(running[kept:])]
    if not plan.preempt:
        return
    least = running[kept]
    assert kept > 0 or any(w.priority < least.priority for w in admitted_of(state, plan))
    grow = least.grow if isinstance(least, Decoding) else 0
    stalled = sum(
        d.grow for d in state.decoding if d.sequence not in plan.decodes and d.sequence not in plan.preempt
    )
    others = sum(r.pages for r in running[kept + 1 :])
    lacks_pages = spent(state, plan) + grow + stalled > state.free_pages + others
    assert lacks_pages or kept + 1 + len(plan.admit) > state.places


def check_admission(state: EngineState, plan: Plan) -> None:
    """First come first served; who is first and is not admitted could not have been."""
    queue = sorted(state.waiting, key=order)
    assert list(plan.admit) == [w.sequence for w in queue[: len(plan.admit)]]
    gone = [r for r in running_of(state) if r.sequence in plan.preempt]
    for prompt in admitted_of(state, plan):
        assert all(order(prompt) < order(victim) for victim in gone)
    rows = sum(chunk.stop - chunk.start for chunk in plan.chunks)
    if len(plan.admit) == len(queue) or rows >= max(state.token_budget - len(state.decoding), 1):
        return
    assert all(
        p.done == p.ready or any(c.sequence == p.sequence and c.stop == p.ready for c in plan.chunks)
        for p in state.prefilling
        if p.sequence not in plan.preempt
    )
    first = queue[len(plan.admit)]
    stays = [r for r in running_of(state) if r.sequence not in plan.preempt]
    lower = [r for r in stays if r.priority > first.priority]
    has_stalled = any(isinstance(r, Decoding) and r.sequence not in plan.decodes for r in stays)
    freed = sum(
        r.pages + (r.grow if isinstance(r, Decoding) and r.sequence in plan.decodes else 0) for r in lower
    )
    given_back = sum(r.pages for r in gone)
    free = state.free_pages + given_back - spent(state, plan)
    assert (
        has_stalled
        or any(order(first) > order(victim) for victim in gone)
        or first.pages > free + freed
        or len(stays) - len(lower) + len(plan.admit) + 1 > state.places
    )


@given(states())
@settings(max_examples=300, deadline=None)
def test_every_plan_keeps_the_rules(state: EngineState) -> None:
    plan = schedule(state)
    check_pages_and_places(state, plan)
    check_rows(state, plan)
    check_decodes(state, plan)
    check_preemption(state, plan)
    check_admission(state, plan)


@given(states(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_plan_does_not_depend_on_the_order_of_the_state(state: EngineState, rng: random.Random) -> None:
    mixed = state._replace(
        waiting=tuple(rng.sample(state.waiting, len(state.waiting))),
        prefilling=tuple(rng.sample(state.prefilling, len(state.prefilling))),
        decoding=tuple(rng.sample(state.decoding, len(state.decoding))),
    )
    plan, other = schedule(state), schedule(mixed)
    assert other._replace(decodes=()) == plan._replace(decodes=())
    assert set(other.decodes) == set(plan.decodes)


@dataclass
class Request:
    """A prompt of `rows` rows, the first `cached` of which need no pages, and its answer."""

    name: str
    priority: int
    arrived: int
    rows: int
    answer: int
    cached: int = 0
    done: int = 0
    fed: int = 0
    pages: int = 0


@dataclass
class Engine:
    """Carries plans out on counted pages. A preempted request comes back some steps later, from its start."""

    num_pages: int
    page_size: int
    places: int
    budget: int
    away: int
    keeps_arrival: bool
    waiting: list[Request] = field(default_factory=list)
    running: dict[str, Request] = field(default_factory=dict)
    gone: deque[tuple[int, Request]] = field(default_factory=deque)
    finished: list[str] = field(default_factory=list)
    arrivals: int = 0
    preemptions: int = 0

    def needed(self, request: Request, slots: int) -> int:
        return -(-slots // self.page_size) - request.cached // self.page_size

    def arrive(self, request: Request, *, is_new: bool) -> None:
        if is_new or not self.keeps_arrival:
            request.arrived = self.arrivals
            self.arrivals += 1
        request.done = request.cached
        self.waiting.append(request)

    def state(self) -> EngineState:
        prompts = [r for r in self.running.values() if r.done < r.rows]
        answers = [r for r in self.running.values() if r.done == r.rows]
        return EngineState(
            waiting=tuple(
                Waiting(r.name, r.priority, r.arrived, r.cached, r.rows, self.needed(r, r.rows))
                for r in self.waiting
            ),
            prefilling=tuple(
                Prefilling(r.name, r.priority, r.arrived, r.done, r.rows, r.pages) for r in prompts
            ),
            decoding=tuple(
                Decoding(r.name, r.priority, r.arrived, self.needed(r, r.rows + r.fed + 1) - r.pages, r.pages)
                for r in answers
            ),
            free_pages=self.num_pages - sum(r.pages for r in self.running.values()),
            places=self.places,
            token_budget=self.budget,
        )

    def step(self, now: int) -> None:
        while self.gone and self.gone[0][0] <= now:
            self.arrive(self.gone.popleft()[1], is_new=False)
        state = self.state()
        plan = schedule(state)
        first = min(running_of(state), key=order, default=None)
        for name in plan.preempt:
            request = self.running.pop(name)
            request.pages = request.fed = 0
            self.gone.append((now + self.away, request))
            self.preemptions += 1
        for name in plan.admit:
            (request,) = [r for r in self.waiting if r.name == name]
            self.waiting.remove(request)
            request.pages = self.needed(request, request.rows)
            self.running[name] = request
        for name, start, stop in plan.chunks:
            assert self.running[name].done == start, "a row is skipped or repeated"
            self.running[name].done = stop
        for name in plan.decodes:
            self.decode(self.running[name])
        held = sum(request.pages for request in self.running.values())
        assert held <= self.num_pages, "pages are given twice"
        assert len(self.running) <= self.places
        if first is not None:
            # the first one moves, or those before it in the queue took its place
            moved = {*plan.decodes, *(chunk.sequence for chunk in plan.chunks)}
            assert first.sequence in moved or plan.preempt or plan.admit, "nothing progresses"

    def decode(self, request: Request) -> None:
        request.fed += 1
        request.pages = self.needed(request, request.rows + request.fed)
        if request.fed == request.answer:
            del self.running[request.name]
            self.finished.append(request.name)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Engine, list[tuple[int, Request]]]:
    engine = Engine(
        num_pages=draw(st.integers(3, 12)),
        page_size=draw(st.integers(1, 4)),
        places=draw(st.integers(1, 6)),
        budget=draw(st.integers(1, 24)),
        away=draw(st.integers(1, 4)),
        keeps_arrival=draw(st.booleans()),
    )
    room = engine.num_pages * engine.page_size
    arrivals = []
    for number in range(draw(st.integers(1, 10))):
        rows = draw(st.integers(1, room - 1))
        answer = draw(st.integers(1, room - rows))
        cached = draw(st.integers(0, (rows - 1) // engine.page_size)) * engine.page_size
        priority = draw(st.sampled_from([0, 0, 0, 1, 2]))
        arrivals.append((draw(st.integers(0, 30)), Request(f"r{number}", priority, 0, rows, answer, cached)))
    return engine, sorted(arrivals, key=lambda arrival: (arrival[0], arrival[1].name))


@given(workloads())
@settings(max_examples=150, deadline=None)
def test_everything_ends_whatever_comes_when(workload: tuple[Engine, list[tuple[int, Request]]]) -> None:
    engine, arrivals = workload
    names = {request.name for _, request in arrivals}
    for now in range(20_000):
        while arrivals and arrivals[0][0] <= now:
            engine.arrive(arrivals.pop(0)[1], is_new=True)
        if len(engine.finished) == len(names):
            break
        engine.step(now)
    assert set(engine.finished) == names, "a request starves"
    assert len(engine.finished) == len(names), "a request ended twice"


@given(workloads())
@settings(max_examples=80, deadline=None)
def test_equal_requests_are_served_in_the_order_they_came(
    workload: tuple[Engine, list[tuple[int, Request]]],
) -> None:
    """Without preemption, which repeats work, also their ends are in order."""
    engine, arrivals = workload
    engine.keeps_arrival, engine.away = True, 1
    for number, (_, request) in enumerate(arrivals):
        request.name, request.priority = f"r{number}", 0
        request.rows, request.answer, request.cached = 3, 4, 0
    engine.num_pages = max(engine.num_pages, -(-7 // engine.page_size))
    names = [request.name for _, request in arrivals]
    for now in range(5_000):
        while arrivals and arrivals[0][0] <= now:
            engine.arrive(arrivals.pop(0)[1], is_new=True)
        if len(engine.finished) == len(names):
            break
        engine.step(now)
    assert set(engine.finished) == set(names)
    if not engine.preemptions:
        assert engine.finished == names
