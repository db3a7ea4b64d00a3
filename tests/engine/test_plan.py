"""plan_step: no row twice, the budget holds, nobody starves, decodes never wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmserve.engine.plan import Chunk, Pending, Plan, plan_step

TOTALS = st.lists(st.integers(1, 300), max_size=8)


def pendings(totals: list[int]) -> list[Pending]:
    return [Pending(f"p{number}", 0, total) for number, total in enumerate(totals)]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 200)), max_size=8),
    st.integers(0, 40),
    st.integers(1, 256),
)
def test_one_step_is_within_its_budget_and_advances_every_decode(
    prompts: list[tuple[int, int]], decodes: int, budget: int
) -> None:
    waiting = [Pending(f"p{i}", done, done + left) for i, (done, left) in enumerate(prompts)]
    running = [f"d{i}" for i in range(decodes)]
    plan = plan_step(waiting, running, budget)
    assert list(plan.decodes) == running
    rows = sum(chunk.stop - chunk.start for chunk in plan.chunks)
    # one row at least, however many decode
    assert rows <= max(budget - decodes, 1)
    assert rows == min(max(budget - decodes, 1), sum(left for _, left in prompts))
    by_name = {pending.sequence: pending for pending in waiting}
    assert [chunk.sequence for chunk in plan.chunks] == [p.sequence for p in waiting][: len(plan.chunks)]
    for chunk in plan.chunks:
        assert chunk.start == by_name[chunk.sequence].done
        assert chunk.start < chunk.stop <= by_name[chunk.sequence].total
    # only the last chunk may stop short of its prompt's end
    assert all(chunk.stop == by_name[chunk.sequence].total for chunk in plan.chunks[:-1])


@given(TOTALS, st.integers(0, 40), st.integers(1, 64))
def test_every_row_runs_exactly_once_and_in_order(totals: list[int], decodes: int, budget: int) -> None:
    done = {pending.sequence: 0 for pending in pendings(totals)}
    total = {pending.sequence: pending.total for pending in pendings(totals)}
    finished: list[str] = []
    for _ in range(sum(totals) + 1):
        waiting = [Pending(name, done[name], total[name]) for name in done if done[name] < total[name]]
        plan = plan_step(waiting, [f"d{i}" for i in range(decodes)], budget)
        assert len(plan.decodes) == decodes
        assert plan.chunks or not waiting, "a prompt starves"
        for name, start, stop in plan.chunks:
            assert start == done[name], "a row is skipped or repeated"
            done[name] = stop
            finished += [name] * (stop == total[name])
    assert done == total
    assert finished == list(total), "a later prompt overtook an earlier one"


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan_step([], [], 8) == Plan((), ())


def test_a_full_batch_of_decodes_leaves_one_row() -> None:
    plan = plan_step([Pending("p", 3, 9)], ["a", "b"], 2)
    assert plan == Plan(("a", "b"), (Chunk("p", 3, 4),))
