"""schedule: one plan at a time, the rules by example."""

from __future__ import annotations

import pytest

from mmserve.engine.scheduler import Chunk, Decoding, EngineState, Plan, Prefilling, Waiting, schedule


def state(
    *sequences: Waiting | Prefilling | Decoding, free: int = 100, places: int = 8, budget: int = 64
) -> EngineState:
    return EngineState(
        waiting=tuple(s for s in sequences if isinstance(s, Waiting)),
        prefilling=tuple(s for s in sequences if isinstance(s, Prefilling)),
        decoding=tuple(s for s in sequences if isinstance(s, Decoding)),
        free_pages=free,
        places=places,
        token_budget=budget,
    )


def waiting(
    name: str, arrived: int, *, rows: int = 10, pages: int = 1, priority: int = 0, done: int = 0
) -> Waiting:
    return Waiting(name, priority, arrived, done, done + rows, pages)


def prefilling(
    name: str, arrived: int, *, done: int = 0, total: int = 10, pages: int = 1, priority: int = 0
) -> Prefilling:
    return Prefilling(name, priority, arrived, done, total, pages)


def decoding(name: str, arrived: int, *, grow: int = 0, pages: int = 1, priority: int = 0) -> Decoding:
    return Decoding(name, priority, arrived, grow, pages)


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert schedule(state()) == Plan((), ())


def test_decodes_and_prompts_share_one_step() -> None:
    plan = schedule(
        state(
            decoding("a", 0),
            decoding("b", 1),
            prefilling("c", 2, done=7, total=10),
            waiting("d", 3, rows=5, done=4),
            waiting("e", 4),
            budget=12,
        )
    )
    # 12 - 2 decodes: 3 rows finish c, all 5 of d after its cached ones, 2 of e
    assert plan == Plan(("a", "b"), (Chunk("c", 7, 10), Chunk("d", 4, 9), Chunk("e", 0, 2)), ("d", "e"))


def test_a_full_batch_of_decodes_leaves_one_row() -> None:
    plan = schedule(state(decoding("a", 0), decoding("b", 1), prefilling("p", 2, done=3), budget=2))
    assert plan == Plan(("a", "b"), (Chunk("p", 3, 4),))


def test_running_prompts_come_before_waiting_ones_of_their_priority() -> None:
    plan = schedule(state(waiting("older", 0), prefilling("runs", 1), budget=10))
    assert plan == Plan((), (Chunk("runs", 0, 10),))
    plan = schedule(state(waiting("urgent", 2, priority=-1), prefilling("runs", 1), budget=15))
    assert plan == Plan((), (Chunk("urgent", 0, 10), Chunk("runs", 0, 5)), ("urgent",))


def test_prompts_are_admitted_in_order_of_priority_then_arrival() -> None:
    plan = schedule(
        state(waiting("c", 2), waiting("a", 9, priority=-1), waiting("b", 1), places=2, budget=100)
    )
    assert plan.admit == ("a", "b")


def test_a_prompt_that_does_not_fit_is_not_overtaken() -> None:
    plan = schedule(state(waiting("large", 0, pages=9), waiting("small", 1), free=8))
    assert plan == Plan((), ())
    assert schedule(state(waiting("large", 0, pages=9), waiting("small", 1), free=10)).admit == (
        "large",
        "small",
    )


def test_pages_that_decodes_need_are_not_given_to_prompts() -> None:
    running = [decoding(f"d{i}", i, grow=2) for i in range(3)]
    assert schedule(state(*running, waiting("p", 9, pages=4), free=9)).admit == ()
    plan = schedule(state(*running, waiting("p", 9, pages=4), free=10))
    assert plan.admit == ("p",)
    assert plan.decodes == ("d0", "d1", "d2")


def test_decodes_without_pages_push_out_the_last_to_come() -> None:
    plan = schedule(
        state(
            decoding("a", 0, grow=4),
            decoding("c", 2, grow=4, pages=1),
            decoding("b", 1, grow=4, pages=3),
            prefilling("d", 3, pages=2),
            free=5,
        )
    )
    # 12 needed of 5: d gives 2, c gives its page and needs no more, and b need not go
    assert plan == Plan(("a", "b"), (), (), ("d", "c"))


def test_the_first_in_order_is_never_pushed_out() -> None:
    plan = schedule(state(decoding("b", 1, pages=1), decoding("a", 0, grow=9), free=3))
    # a waits one step: what it needs is more than b says it frees
    assert plan == Plan((), (), (), ("b",))
    assert schedule(state(decoding("a", 0, grow=9), free=3)) == Plan((), ())


def test_what_was_pushed_out_leaves_its_pages_to_nobody_behind_it() -> None:
    running = (decoding("a", 0, grow=1), decoding("b", 1, pages=8))
    assert schedule(state(*running, waiting("c", 2), free=0)) == Plan(("a",), (), (), ("b",))
    early = schedule(state(*running, waiting("c", 2, priority=-1), free=0))
    assert early == Plan(("a",), (Chunk("c", 0, 10),), ("c",), ("b",))


def test_pages_for_a_stalled_decode_are_not_taken_by_prompts() -> None:
    assert schedule(state(decoding("a", 0, grow=4), waiting("b", 1), free=3)) == Plan((), ())


@pytest.mark.parametrize("place", ["pages", "places"])
def test_a_higher_priority_pushes_out_lower_ones_when_that_makes_it_fit(place: str) -> None:
    running = (
        decoding("same", 0, pages=5, priority=1),
        prefilling("low", 1, pages=2, priority=2, done=3),
        decoding("lowest", 2, pages=2, grow=1, priority=3),
    )
    limits = {"free": 1, "places": 9} if place == "pages" else {"free": 99, "places": 2}

    def plan(pages: int) -> Plan:
        return schedule(state(*running, waiting("new", 3, pages=pages, priority=1), **limits))

    expected = Plan(("same",), (Chunk("new", 0, 10),), ("new",), ("lowest", "low"))
    assert plan(5) == expected
    if place == "pages":
        # less would do with one fewer, and more would not do with both: then nobody goes
        assert plan(3).preempt == ("lowest",)
        assert plan(6) == Plan(("same", "lowest"), (Chunk("low", 3, 10),))


def test_equal_priority_pushes_nobody_out() -> None:
    assert schedule(state(decoding("a", 1), waiting("b", 0), free=0)) == Plan(("a",), ())


def test_a_finished_prompt_only_holds_its_pages() -> None:
    parked = prefilling("p", 1, done=10, total=10, pages=3)
    assert schedule(state(parked)) == Plan((), ())
    assert schedule(state(parked, decoding("a", 0, grow=2), free=0)) == Plan(("a",), (), (), ("p",))


def test_a_large_prompt_gets_its_turn_among_ever_new_small_ones() -> None:
    """Small prompts take 1 of 4 pages for 3 steps; two come at every step, and one asks for all 4."""
    ends: dict[str, int] = {}
    queue: list[Waiting] = []
    for now in range(40):
        queue += [waiting(f"s{now}-{i}", 10 * now + i) for i in range(2)]
        if now == 5:
            queue.append(waiting("large", 10 * now + 5, pages=4))
        ends = {name: end for name, end in ends.items() if end > now}
        running = [decoding(name, number) for number, name in enumerate(ends)]
        plan = schedule(state(*queue, *running, free=4 - len(ends)))
        if "large" in plan.admit:
            assert [prompt.sequence for prompt in queue][: len(plan.admit)] == list(plan.admit)
            return
        ends |= dict.fromkeys(plan.admit, now + 3)
        queue = [prompt for prompt in queue if prompt.sequence not in plan.admit]
    raise AssertionError("the large prompt starves")


# answers with pages of their own


def apart(*sequences: Waiting | Prefilling | Decoding, free: int, answers: int) -> EngineState:
    return state(*sequences, free=free)._replace(free_answer_pages=answers)


def test_a_prompt_needs_pages_of_both_kinds() -> None:
    prompt = waiting("p", 0, pages=4)._replace(answer_pages=6)
    assert schedule(apart(prompt, free=4, answers=6)).admit == ("p",)
    assert schedule(apart(prompt, free=3, answers=9)).admit == ()
    assert schedule(apart(prompt, free=9, answers=5)).admit == ()


def test_answers_grow_in_their_own_pages_only() -> None:
    answers = decoding("a", 0, grow=2, pages=5), decoding("b", 1, grow=2, pages=5)
    assert schedule(apart(*answers, free=0, answers=4)).decodes == ("a", "b")
    plan = schedule(apart(*answers, free=100, answers=3))
    assert (plan.decodes, plan.preempt) == (("a",), ("b",))


def test_a_preempted_prompt_frees_both_kinds_and_an_answer_its_own() -> None:
    running = decoding("a", 0, grow=2, pages=5), prefilling("p", 1, pages=7)._replace(answer_pages=3)
    plan = schedule(apart(*running, free=0, answers=0))
    assert (plan.decodes, plan.preempt) == (("a",), ("p",))
    urgent = waiting("u", 2, pages=7, priority=-1)._replace(answer_pages=3)
    plan = schedule(apart(*running, urgent, free=0, answers=2))
    assert (plan.admit, plan.preempt) == (("u",), ("p",))
    # what an answer gives back is of no use to a prompt that lacks pages for prompts
    plan = schedule(apart(decoding("a", 0, pages=50), urgent, free=6, answers=3))
    assert (plan.admit, plan.preempt) == ((), ())
