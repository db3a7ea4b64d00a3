"""Embeddings and KV between workers: over tcp, rounded or lost on the way: the same answers (R4, R34)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from mmserve.config import ServeConfig, Transfer, WireDtype
from mmserve.errors import MMServeError
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.request import Chunk, RequestOutput
from mmserve.sampling import SamplingParams

from .conftest import ask
from .test_chaos import REQUESTS, Crowd

Clips = list[tuple[Path, Example]]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
CLIPS = 6
DEADLINE_S = 120.0


@contextmanager
def started(transfer: Transfer, epd: tuple[int, int, int] | None) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmserve.llm.ServeConfig", partial(ServeConfig, transfer=transfer))
        llm = LLM(epd=epd, threads=1)
    with llm:
        yield llm


@pytest.fixture(scope="module")
def over_tcp() -> Iterator[LLM]:
    with started(Transfer(plane="tcp"), (1, 1, 1)) as llm:
        yield llm


def answers(llm: LLM, clips: Clips) -> list[tuple[int, ...]]:
    asked = [ask(clip, example.question.text) for clip, example in clips[:CLIPS]]
    return [output.outputs[0].token_ids for output in llm.chat(asked, PARAMS)]


@pytest.fixture(scope="module")
def expected(llm: LLM, basic_clips: Clips) -> list[tuple[int, ...]]:
    return answers(llm, basic_clips)


def test_over_tcp_the_answers_are_those_of_one_process(
    over_tcp: LLM, basic_clips: Clips, expected: list[tuple[int, ...]]
) -> None:
    assert answers(over_tcp, basic_clips) == expected
    assert over_tcp._runtime.pipeline.counts().get("lost_leases", 0) == 0


def test_every_socket_listens_on_loopback_and_every_directory_is_private(over_tcp: LLM) -> None:
    runtime = over_tcp._runtime
    pids = [os.getpid(), *over_tcp.worker_pids().values()]
    found = {address for pid in pids for address in listening(pid)}
    assert len(found) >= 4, "one of each worker and one of the dispatcher"
    assert all(address == "0100007F" for address, _ in found), found
    for directory in runtime._run_dir.directories:
        assert directory.stat().st_mode & 0o777 == 0o700


def listening(pid: int) -> Iterator[tuple[str, str]]:
    """Address and port, in hex, of every tcp socket on which a process listens."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and parts[9] in inodes:
                address, _, port = parts[1].partition(":")
                yield address, port


@pytest.mark.parametrize(
    "wire_dtype",
    [
        "int8",
        pytest.param("fp8", marks=pytest.mark.slow),
        pytest.param("bf16", marks=pytest.mark.slow),
    ],
)
def test_rounded_embeddings_give_the_answers_of_exact_ones(
    wire_dtype: WireDtype, basic_clips: Clips, llm: LLM
) -> None:
    params = SamplingParams(max_tokens=8)
    asked = [ask(clip, example.question.text) for clip, example in basic_clips[:CLIPS]]
    exact = [output.outputs[0].text for output in llm.chat(asked, params)]
    with started(Transfer(wire_dtype=wire_dtype), None) as rounding:
        assert [output.outputs[0].text for output in rounding.chat(asked, params)] == exact


# what is lost on its way


class Asked:
    """One question on its way, while the worker that will read its embeddings stands still."""

    def __init__(self, llm: LLM, clip: Path, question: str) -> None:
        self._llm = llm
        self._done = threading.Event()
        self._result: RequestOutput | MMServeError | None = None
        self._reader = next(pid for name, pid in llm.worker_pids().items() if name.startswith("prefill"))
        os.kill(self._reader, signal.SIGSTOP)
        llm.submit(ask(clip, question), PARAMS, deliver=self._take)

    def _take(self, news: Chunk | RequestOutput | MMServeError) -> None:
        if not isinstance(news, Chunk):
            self._result = news
            self._done.set()

    def wait_published(self) -> list[Path]:
        """Files of its embeddings, when it has some."""
        directories = self._llm._runtime._run_dir.directories
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            if found := [path for one in directories for path in one.glob("leases-*/*.lease")]:
                return found
            time.sleep(0.002)
        raise AssertionError("nothing was published")

    def answer(self) -> tuple[int, ...]:
        os.kill(self._reader, signal.SIGCONT)
        assert self._done.wait(DEADLINE_S)
        assert isinstance(self._result, RequestOutput), self._result
        return self._result.outputs[0].token_ids


def re_encoded(llm: LLM) -> int:
    return llm._runtime.pipeline.counts().get("re_encoded", 0)


def retries(llm: LLM) -> int:
    return llm._runtime.pipeline.counts().get("retries", 0)


def test_files_dropped_between_encode_and_prefill_are_encoded_again(
    epd: LLM, basic_clips: Clips, expected: list[tuple[int, ...]]
) -> None:
    clip, example = basic_clips[0]
    before = re_encoded(epd) + retries(epd)
    for _ in range(5):  # what was seen first may be a file that nobody was going to read
        asked = Asked(epd, clip, example.question.text)
        for path in asked.wait_published():
            path.unlink(missing_ok=True)
        assert asked.answer() == expected[0]
        if re_encoded(epd) + retries(epd) > before:
            return
    raise AssertionError("no lost file was noticed")


def test_embeddings_that_die_with_their_server_are_encoded_again(
    over_tcp: LLM, basic_clips: Clips, expected: list[tuple[int, ...]]
) -> None:
    clip, example = basic_clips[1]
    before = re_encoded(over_tcp) + retries(over_tcp)
    asked = Asked(over_tcp, clip, example.question.text)
    (path, *_) = asked.wait_published()
    owner = int(path.parent.name.split("-")[1])
    os.kill(owner, signal.SIGKILL)
    assert asked.answer() == expected[1]
    # its last part may not have been published yet: then it is its death that begins it anew
    assert re_encoded(over_tcp) + retries(over_tcp) > before


@pytest.mark.slow
def test_a_killed_worker_of_any_stage_loses_no_answer_over_tcp(
    over_tcp: LLM, epd: LLM, basic_clips: Clips
) -> None:
    undisturbed = Crowd(epd, basic_clips).answers()
    for role, tokens in (("encode", 0), ("prefill", 100), ("decode", 300)):
        crowd = Crowd(over_tcp, basic_clips)
        crowd.after(tokens)
        os.kill(
            next(pid for name, pid in over_tcp.worker_pids().items() if name.startswith(role)), signal.SIGKILL
        )
        assert crowd.answers() == undisturbed
    assert len(undisturbed) == REQUESTS
