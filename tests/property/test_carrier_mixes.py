"""Random mixes of requests with carriers and without, against the same requests one by one.

Videos grow part by part, beginnings are shared, pages are too scarce for all raw tokens, some are
preempted, cancelled, handed over, or compress their KV as well. The page table is checked after every step.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmserve import messages as m
from mmserve.request import Methods
from mmserve.sampling import SamplingParams
from mmserve.workers.language import LanguageHandler
from mmserve.workers.lasting import most_slots
from tests.property.test_engine_mixes import TIE, Deployment, Job, alone
from tests.workers.carried import Clip, plain, text
from tests.workers.fakes import Engine


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    step = LanguageHandler.step

    def checked(handler: LanguageHandler) -> bool:
        found = step(handler)
        runner = handler._runner
        runner.table.check([runner.prefix.pages])
        return found

    monkeypatch.setattr(LanguageHandler, "step", checked)


def make_jobs(rng: random.Random, engine: Engine) -> list[Job]:
    clips = [Clip(rng.randint(1, 12), rng.randint(1, 9), seed, rng.randint(1, 4)) for seed in range(1, 4)]
    clips.append(Clip(0, rng.randint(1, 9), 9))
    beginnings: list[tuple[tuple[int, ...], tuple[m.PromptItem, ...]]] = [((), ())]
    for clip in clips:
        before, items = rng.choice(beginnings)
        words = text(rng.randint(0, 9), rng.randint(0, 9))
        beginnings.append(((*before, *words, clip.token), (*items, clip.item(engine))))
    jobs = []
    for index in range(rng.randint(1, 8)):
        before, items = rng.choice(beginnings)
        prune = rng.choice(["carriers", "carriers", "carriers", "none"])
        command = m.PrefillPrompt(
            request_id=f"r{index}",
            attempt=0,
            token_ids=(*before, *text(rng.randint(1, 12), rng.randint(0, 9))),
            items=items if prune == "carriers" else tuple(map(plain, items)),
            sampling=SamplingParams(max_tokens=rng.choice([1, 8, 80, 80]), ignore_eos=True),
            methods=Methods(
                prune=prune,
                kv=rng.choice(["none", "none", "snapkv", ("random", "h2o", "laq")[index % 3]]),
                kv_budget=0.5,
            ),
            priority=rng.choice([0, 0, 0, 1]),
        )
        jobs.append(Job(command, rng.randint(0, 40) if rng.random() < 0.15 else None))
    return jobs


def run_mix(seed: int, directory: Path) -> int:
    """Returns how many preemptions there were."""
    rng = random.Random(seed)
    pages, budget = rng.choice([40, 60, 100, 400]), rng.choice([1, 7, 64, 2048])
    prefill = Engine(directory, pages=pages, token_budget=budget)
    decode = prefill if rng.random() < 0.6 else Engine(directory, pages=pages, token_budget=budget)
    deployment = Deployment(prefill, decode, rng)
    jobs = [
        job
        for job in make_jobs(rng, prefill)
        # what cannot fit in an empty worker is refused; a bound may be 3 rows higher while an item grows
        if prefill.table.pages_for(
            most_slots(job.command, budget) + 3 * len(job.command.items) + job.command.sampling.max_tokens
        )
        <= prefill.table.num_pages
    ]
    deployment.run(jobs)
    for job in jobs:
        expected, gaps = alone(job, directory)
        assert job.is_over
        if job.cancel_at is not None and len(job.tokens) < len(expected):
            expected = expected[: len(job.tokens)]
        if job.tokens != expected:
            where = next(i for i, token in enumerate(job.tokens) if token != expected[i])
            assert gaps[where] < TIE, (seed, job.command.request_id, where)
    for engine in deployment.engines:
        assert engine.used_pages == 0, "a page leaked"
        engine.runner.prefix.clear()
        assert engine.table.used_pages == 0
    return deployment.preemptions


def test_a_mix_gives_every_request_what_it_gets_alone(tmp_path: Path) -> None:
    preemptions = [run_mix(seed, tmp_path) for seed in range(14)]
    assert sum(preemptions) > 0, "no mix of these was short of pages"


@pytest.mark.slow
def test_a_thousand_mixes(tmp_path: Path) -> None:
    assert sum(run_mix(seed, tmp_path) for seed in range(1000)) > 20
