"""Decoders that do the worst they can, in the sandbox: the worker only hears that the media is bad (R13)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mmserve.errors import MediaError
from mmserve.media import sandbox as sandboxes
from mmserve.media.limits import MediaLimits
from mmserve.media.sandbox import Sandbox
from tests.media.clips import make_video, reference

# imported by the process at its start, before anything of ours: what a file is called is what it does
STUB = """
import ctypes, os, socket, sys, threading, time
from mmserve.media import jobs

planned = jobs.Decoder._plan

def fork():
    while True:
        os.fork()

def fill(disk):
    with open(disk, "wb") as file:
        while True:
            file.write(bytes(1 << 20))

def plan(self, job):
    name = os.path.basename(job.ref.path)
    acts = {
        "segfault": lambda: ctypes.string_at(0),
        "abort": os.abort,
        "exit": lambda: os._exit(0),
        "spin": lambda: [None for _ in iter(int, 1)],
        "allocate": lambda: bytearray(4 << 30),
        "fork": fork,
        "sleep": lambda: time.sleep(1000),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
        "kill": lambda: os.kill(os.getppid(), 9),
        "fill": lambda: fill(self._directory / "full"),
        "chatter": lambda: os.write(1, b"x" * 10_000),
        "threads": lambda: [threading.Thread(target=time.sleep, args=(9,)).start() for _ in iter(int, 1)],
        "deep": lambda: ctypes.pythonapi.PyObject_Repr(ctypes.py_object(deep())),
    }
    if name in acts:
        acts[name]()
    return planned(self, job)

def deep():
    found = []
    for _ in range(10**6):
        found = [found]
    return found

jobs.Decoder._plan = plan
"""
ACTS = ["segfault", "abort", "exit", "spin", "allocate", "fork", "sleep", "connect", "kill", "fill"]
ACTS += ["chatter", "threads", "deep"]
DEADLINE_S = 2.0
SLACK_S = 3.0  # 0.2 s where nothing else runs
LIMITS = MediaLimits(
    job_deadline_s=DEADLINE_S, process_memory_bytes=1 << 30, job_cpu_s=1, max_decoded_bytes=64 << 20
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("stub")
    (folder / "sitecustomize.py").write_text(STUB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandboxes, "_PACKAGE_ROOT", f"{folder}{os.pathsep}{sandboxes._PACKAGE_ROOT}")
        made = Sandbox(tmp_path_factory.mktemp("frames"), LIMITS)
        yield made
        made.close()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="rights are taken away by Linux' seccomp")
@pytest.mark.parametrize("act", ACTS)
def test_whatever_a_decoder_does_its_media_alone_is_refused(
    sandbox: Sandbox, tmp_path: Path, act: str
) -> None:
    """R13: 422 at the deadline at the latest, everything else alive, and the next file is decoded."""
    clip = reference(make_video(tmp_path / "clip.mp4", frames=4))
    assert sandbox.plan(clip).num_frames == 4
    before, others = psutil.Process().memory_info().rss, children()
    (tmp_path / act).write_bytes(b"x")
    began = time.perf_counter()
    with pytest.raises(MediaError) as caught:
        sandbox.plan(reference(tmp_path / act))
    assert time.perf_counter() - began < DEADLINE_S + SLACK_S
    assert caught.value.status == 422
    began = time.perf_counter()
    assert sandbox.plan(clip).num_frames == 4
    assert time.perf_counter() - began < 1.0 + 4 * SLACK_S  # 1 s where nothing else runs
    assert psutil.Process().memory_info().rss - before < 50 << 20
    assert len(children() - others) <= 1, "nothing was left behind but who came in its place"
    for left in sandbox._directory.iterdir():
        left.unlink()
