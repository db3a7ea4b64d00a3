"""Sides in processes of their own: jobs there, outcomes back, failures told, memory counted."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from mmserve.bench import memory
from mmserve.bench import side as module
from mmserve.bench.agreement import check_exactly, check_nearly
from mmserve.bench.memory import FilesWatch, peak_bytes
from mmserve.bench.requests import Ask
from mmserve.bench.side import Job, Outcome, RemoteSide, SideConfig, serve
from mmserve.errors import MMServeError

ASK = Ask(video=1, frames=2)
JOB = Job(kind="together", asks=(ASK,), tokens=3)


class Echo:
    """Takes a second per token; refuses to decode."""

    def __init__(self, config: SideConfig) -> None:
        self.config = config

    def run(self, job: Job) -> Outcome:
        if job.kind == "decode":
            raise ValueError("not now")
        return Outcome(seconds=job.tokens, candidates={7: -0.5})

    def close(self) -> None:
        """Nothing to close."""


def served(*messages: object, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    monkeypatch.setattr(module, "make_worker", lambda name, config: Echo(config))
    answers = io.BytesIO()
    serve("echo", io.BytesIO(b"".join(msgspec.json.encode(m) + b"\n" for m in messages)), answers)
    return [msgspec.json.decode(line) for line in answers.getvalue().splitlines()]


def test_every_line_has_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = msgspec.structs.replace(JOB, kind="decode")
    ready, done, failed, again = served(
        SideConfig(checkpoint="x"), JOB, failing, JOB, monkeypatch=monkeypatch
    )
    assert (ready["outcome"], ready["error"]) == (None, None)
    assert msgspec.convert(done["outcome"], Outcome, strict=False).candidates == {7: -0.5}
    assert failed["error"] == "ValueError: not now"
    assert again == done


def test_a_side_that_cannot_start_says_why() -> None:
    with pytest.raises(MMServeError, match="unknown side of the benchmark failed: KeyError"):
        RemoteSide("unknown", SideConfig(checkpoint="x"))


def test_a_side_that_dies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(MMServeError, match="ended with 1"):
        RemoteSide("mmserve", SideConfig(checkpoint="x"))


def test_memory_of_children_counts() -> None:
    code = "block = 50_000_000 * bytes([1]); import sys; print(flush=True); sys.stdin.read()"
    before = peak_bytes(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert peak_bytes(child.pid) > 50_000_000
        assert peak_bytes(os.getpid()) > before + 50_000_000
        child.communicate()


class Fixed:
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def run(self, job: Job) -> Outcome:
        return self.outcome

    def close(self) -> None:
        """Nothing to close."""


EXACT = Outcome(token_ids=(1, 2), prompt_logprobs=(-1.0, -2.0))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (msgspec.structs.replace(EXACT, token_ids=(1, 3)), "tokens"),
        (msgspec.structs.replace(EXACT, prompt_logprobs=(-1.0, -2.01)), "differ by 0.01"),
        (msgspec.structs.replace(EXACT, prompt_logprobs=(-1.0, float("nan"))), "differ by"),
        (msgspec.structs.replace(EXACT, prompt_logprobs=(-1.0,)), "Expected 2"),
    ],
)
def test_other_numbers_are_no_speed(other: Outcome, reason: str) -> None:
    assert check_exactly(Fixed(EXACT), Fixed(EXACT), ASK)["max_abs_difference"] == 0
    with pytest.raises(MMServeError, match=reason):
        check_exactly(Fixed(other), Fixed(EXACT), ASK)


def test_first_tokens_may_differ_a_little() -> None:
    peer = Outcome(candidates={1: -0.5, 2: -1.0, 3: -4.0})
    assert check_nearly(Outcome(candidates={1: -0.6, 2: -1.0}), peer)["max_abs_difference"] == pytest.approx(
        0.1
    )
    with pytest.raises(MMServeError, match="no speed"):
        check_nearly(Outcome(candidates={1: -1.5}), peer)
    with pytest.raises(MMServeError, match=r"\[9\]"):
        check_nearly(Outcome(candidates={9: -0.5}), peer)


def test_files_in_shared_memory_count_while_nobody_maps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SHARED_MEMORY", tmp_path)
    for pid in (7, 8):
        (tmp_path / f"mmserve-{pid}-0" / "leases").mkdir(parents=True)
    watch = FilesWatch(7)
    (tmp_path / "mmserve-8-0" / "leases" / "other").write_bytes(bytes(10_000_000))
    lease = tmp_path / "mmserve-7-0" / "leases" / "one"
    lease.write_bytes(bytes(1_000_000))
    until = time.monotonic() + 10
    while watch.peak_bytes < 1_000_000 and time.monotonic() < until:
        time.sleep(0.01)
    lease.unlink()
    watch.close()
    assert 1_000_000 <= watch.peak_bytes < 2_000_000
