"""Random mixes of requests against the same requests one by one: equal tokens, no page leaked.

Prompts share beginnings (forks of cached pages), pages are scarce (preemptions), some are cancelled,
some compress their KV, some lose visual rows between layers, some are sampled. Colocated, and prefilled
on one worker and decoded on another.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from mmserve import messages as m
from mmserve.methods import INNER, WITH_WEIGHTS
from mmserve.request import Methods
from mmserve.sampling import Logprob, SamplingParams
from tests.workers.fakes import IMAGE, VIDEO, Engine, whole

TIE = 1e-3  # two logits closer than this may change places


@dataclass
class Job:
    command: m.PrefillPrompt
    cancel_at: int | None  # step of the whole deployment
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    is_over: bool = False


def video(rng: random.Random, engine: Engine, seed: int) -> m.PromptItem:
    """An item of up to three parts."""
    parts, first = [], 0
    for _ in range(rng.randint(1, 3)):
        tokens = rng.randint(2, 14)
        parts.append(engine.part(tokens, seed=seed, first=first))
        first += tokens
    return whole(*parts)


def make_jobs(rng: random.Random, engine: Engine) -> list[Job]:
    media = [(VIDEO, video(rng, engine, seed)) for seed in (1, 2)]
    media.append((IMAGE, engine.item(9, [0, 1, 4, 7], seed=3)))
    beginnings: list[tuple[tuple[int, ...], tuple[m.PromptItem, ...]]] = [((), ())]
    for token, item in media:
        text, items = rng.choice(beginnings)
        words = tuple(rng.randint(1, 45) for _ in range(rng.randint(0, 12)))
        beginnings.append(((*text, *words, token), (*items, item)))
    jobs = []
    for index in range(rng.randint(1, 9)):
        text, items = rng.choice(beginnings)
        words = tuple(rng.randint(1, 45) for _ in range(rng.randint(1, 14)))
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 90 if rng.random() < 0.4 else 10),
            ignore_eos=rng.random() < 0.8,
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        )
        kv = rng.choice(["none", "none", "none", "snapkv", "another"])
        kv = ("random", "h2o", "adakv", "look_m")[index % 4] if kv == "another" else kv
        prune = rng.choice(["none", "none", *sorted(set(INNER) - set(WITH_WEIGHTS))])
        command = m.PrefillPrompt(
            request_id=f"r{index}",
            attempt=0,
            token_ids=(*text, *words),
            items=items,
            sampling=sampling,
            methods=Methods(prune=prune, keep=rng.choice([0.3, 0.6]), kv=kv, kv_budget=0.5),
            priority=rng.choice([0, 0, 0, 1, -1]),
        )
        jobs.append(Job(command, rng.randint(0, 40) if rng.random() < 0.15 else None))
    return jobs


class Together(random.Random):
    """Everything is sent at once and complete."""

    def random(self) -> float:
        return 0.0


class Deployment:
    """One or two workers, and the dispatcher's part as a loop."""

    def __init__(self, prefill: Engine, decode: Engine, rng: random.Random) -> None:
        self.prefill, self.decode = prefill, decode
        self.rng = rng
        self.later: list[m.ExtendPrompt] = []
        self.jobs: dict[str, Job] = {}
        self.seen = {id(engine): 0 for engine in self.engines}
        self.preemptions = 0

    @property
    def engines(self) -> list[Engine]:
        return list({id(engine): engine for engine in (self.prefill, self.decode)}.values())

    def send(self, job: Job) -> None:
        command = job.command
        self.jobs[command.request_id] = job
        # parts that were not encoded yet come in any later step
        there = tuple(self.withhold(job, index, item) for index, item in enumerate(command.items))
        self.prefill.handler.handle(
            m.PrefillPrompt(
                request_id=command.request_id,
                attempt=job.attempt,
                token_ids=command.token_ids,
                items=there,
                sampling=command.sampling,
                methods=command.methods,
                priority=command.priority,
                forced=tuple(job.tokens),
                hand_off=self.prefill is not self.decode,
            )
        )

    def withhold(self, job: Job, index: int, item: m.PromptItem) -> m.PromptItem:
        """What is there of an item when its prompt is sent."""
        if self.rng.random() < 0.5:
            return item
        count = self.rng.randint(0, len(item.parts) - 1)
        self.later += [
            m.ExtendPrompt(
                request_id=job.command.request_id,
                attempt=job.attempt,
                item=index,
                part=part,
                is_last=number == len(item.parts) - 1,
            )
            for number, part in enumerate(item.parts)
            if number >= count
        ]
        return msgspec.structs.replace(
            item, parts=item.parts[:count], is_whole=False, keep_bound=item.keep_bound + 3
        )

    def cancel(self, job: Job) -> None:
        job.is_over = True
        for engine in self.engines:
            engine.handler.handle(m.CancelRequest(request_id=job.command.request_id))

    def run(self, jobs: list[Job]) -> None:
        unsent = list(jobs)
        for step in range(5000):
            while unsent and self.rng.random() < 0.5:
                self.send(unsent.pop(0))
            while self.later and self.rng.random() < 0.5:
                self.prefill.handler.handle(self.later.pop(0))
            for job in self.jobs.values():
                if job.cancel_at == step and not job.is_over:
                    self.cancel(job)
            busy = [engine.handler.step() for engine in self.engines]
            for engine in self.engines:
                while self.seen[id(engine)] < len(engine.reporter.events):
                    event = engine.reporter.events[self.seen[id(engine)]]
                    self.seen[id(engine)] += 1
                    busy.append(self.on_event(event))
            if not unsent and not self.later and not any(busy):
                return
        raise AssertionError("the mix never ends")

    def on_event(self, event: m.AnyEvent) -> bool:
        """What the dispatcher does; whether something was sent."""
        assert not isinstance(event, m.RequestFailed), event
        if isinstance(event, m.TokensDecoded):
            for token in event.tokens:
                self.take(token)
        elif isinstance(event, m.PromptPrefilled):
            job = self.jobs[event.request_id]
            if event.first is not None:
                self.take(event.first)
            if not job.is_over and event.attempt == job.attempt:
                self.go_on(job, event)
                return True
        elif isinstance(event, m.RequestPreempted):
            self.preemptions += 1
            job = self.jobs[event.request_id]
            if not job.is_over and event.attempt == job.attempt:
                job.attempt += 1
                self.send(job)
                return True
        return False

    def take(self, token: m.Sampled) -> None:
        job = self.jobs[token.request_id]
        if job.is_over or token.attempt != job.attempt:
            return
        assert token.seq == len(job.tokens), "a token is missing, or came twice"
        job.tokens.append(token.token_id)
        job.is_over = token.finish is not None

    def go_on(self, job: Job, event: m.PromptPrefilled) -> None:
        command = job.command
        self.decode.handler.handle(
            m.DecodeFrom(
                request_id=event.request_id,
                attempt=event.attempt,
                tokens=tuple(job.tokens),
                sampling=command.sampling,
                next_order=event.next_order,
                next_position=event.next_position,
                lease=event.lease,
                slots=event.slots,
                prompt_ids=command.token_ids if command.sampling.repetition_penalty != 1 else (),
                priority=command.priority,
            )
        )


def alone(job: Job, directory: Path) -> tuple[list[int], list[float]]:
    """The one-request oracle: tokens, and how far the second-best score was behind each."""
    engine = Engine(directory)
    deployment = Deployment(engine, engine, Together())
    command = job.command
    with_gaps = m.PrefillPrompt(
        request_id=command.request_id,
        attempt=0,
        token_ids=command.token_ids,
        items=command.items,
        sampling=_with_logprobs(command.sampling),
        methods=command.methods,
    )
    single = Job(with_gaps, None)
    deployment.run([single])
    firsts = [event.first for event in engine.reporter.of(m.PromptPrefilled) if event.first]
    later = [token for event in engine.reporter.of(m.TokensDecoded) for token in event.tokens]
    return single.tokens, [_gap(token.logprobs or {}) for token in (*firsts, *later)]


def _with_logprobs(sampling: SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
        repetition_penalty=sampling.repetition_penalty,
        logprobs=5,
    )


def _gap(logprobs: dict[int, Logprob]) -> float:
    best = sorted((entry.logprob for entry in logprobs.values()), reverse=True)
    return best[0] - best[1]


def run_mix(seed: int, directory: Path) -> int:
    """Returns how many preemptions there were."""
    rng = random.Random(seed)
    pages, budget = rng.choice([60, 110, 130, 400]), rng.choice([1, 7, 64, 2048])
    prefill = Engine(directory, pages=pages, token_budget=budget)
    decode = prefill if rng.random() < 0.6 else Engine(directory, pages=pages, token_budget=budget)
    jobs = make_jobs(rng, prefill)
    deployment = Deployment(prefill, decode, rng)
    # what cannot fit in an empty worker, the dispatcher refuses
    table = prefill.table
    fitting = []
    for job in jobs:
        text = len(job.command.token_ids) - len(job.command.items)
        rows = text + sum(item.keep_bound + 3 for item in job.command.items)
        if table.pages_for(rows + job.command.sampling.max_tokens) <= table.num_pages:
            fitting.append(job)
    deployment.run(fitting)
    for job in fitting:
        expected, gaps = alone(job, directory)
        assert job.is_over
        if job.cancel_at is not None and len(job.tokens) < len(expected):
            expected = expected[: len(job.tokens)]
        if job.tokens != expected:
            where = next(i for i, token in enumerate(job.tokens) if token != expected[i])
            # penalties act after the scores that are reported
            tie = TIE if job.command.sampling.repetition_penalty == 1 else 0.1
            assert gaps[where] < tie, (seed, job.command.request_id, where)
    for engine in deployment.engines:
        assert engine.used_pages == 0, "a page leaked"
        engine.check()
        engine.runner.prefix.clear()
        assert engine.table.used_pages == 0
    return deployment.preemptions


def test_a_mix_gives_every_request_what_it_gets_alone(tmp_path: Path) -> None:
    preemptions = [run_mix(seed, tmp_path) for seed in range(12, 24)]
    assert sum(preemptions) > 0, "no mix of these was short of pages"


def test_long_answers_about_one_prompt_when_pages_are_short(tmp_path: Path) -> None:
    """To preempt one frees only what the others do not share with it."""
    engine = Engine(tmp_path, pages=300)
    item = engine.item(12, seed=1)
    jobs = [
        Job(
            m.PrefillPrompt(
                request_id=f"r{index}",
                attempt=0,
                token_ids=(VIDEO, 1, 2, 3, 4, 5 + index),
                items=(item,),
                sampling=SamplingParams(max_tokens=90, ignore_eos=True),
                methods=Methods(),
            ),
            None,
        )
        for index in range(4)
    ]
    deployment = Deployment(engine, engine, Together())
    deployment.run(jobs)
    assert deployment.preemptions > 0
    for job in jobs:
        assert job.tokens == alone(job, tmp_path)[0]
    assert engine.used_pages == 0


@pytest.mark.slow
def test_a_thousand_mixes(tmp_path: Path) -> None:
    assert sum(run_mix(seed, tmp_path) for seed in range(1000)) > 100
