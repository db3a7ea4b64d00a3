"""The decoding process: same frames as without it, and nothing it does to itself harms us (R13, R14)."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmserve.errors import BadRequest, MediaError, Unavailable, WireError
from mmserve.media import protocol
from mmserve.media.arrays import save_frames
from mmserve.media.digest import file_digest
from mmserve.media.limits import MediaLimits
from mmserve.media.sandbox import Sandbox
from mmserve.media.store import ContentStore
from mmserve.media.video import decode_frames, plan_video
from mmserve.request import MediaOptions, MediaRef
from tests.media.clips import make_video, reference, shade, shade_of

LIMITS = MediaLimits(job_deadline_s=20)


@pytest.fixture
def frames_dir(tmp_path: Path) -> Path:
    path = tmp_path / "frames"
    path.mkdir()
    return path


@pytest.fixture
def sandbox(frames_dir: Path) -> Iterator[Sandbox]:
    made = Sandbox(frames_dir, LIMITS)
    yield made
    made.close()
    assert list(frames_dir.iterdir()) == []


def pid_of(sandbox: Sandbox) -> int:
    return sandbox._thread.submit(sandbox._start).result()._popen.pid


def test_videos_come_back_as_decoded_directly(sandbox: Sandbox, tmp_path: Path) -> None:
    ref = reference(make_video(tmp_path / "clip.mp4", b_frames=2))
    plan = sandbox.plan(ref)
    assert plan == plan_video(ref.path, ref.options, LIMITS)
    direct = dict(decode_frames(ref.path, plan, range(plan.num_frames)))
    for positions in (range(0, 8), range(8, 16), [23, 3, 3], range(24)):
        decoded = sandbox.decode(ref, plan, list(positions))
        assert decoded.positions == tuple(sorted(set(positions)))
        assert decoded.lost == ()
        assert decoded.decode_ms > 0
        for position, frame in zip(decoded.positions, decoded.frames, strict=True):
            np.testing.assert_array_equal(frame, direct[position])


def test_images_have_one_frame(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(pixels).save(path)
    ref = reference(path, "image")
    plan = sandbox.plan(ref)
    decoded = sandbox.decode(ref, plan)
    assert (plan.kind, plan.width, plan.height, plan.times_s) == ("image", 7, 5, (0.0,))
    np.testing.assert_array_equal(decoded.frames, pixels[None])
    decoded.frames[:] = 0  # ours to write


def test_arrays_are_taken_as_sampled(sandbox: Sandbox, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)
    store = ContentStore(tmp_path)
    ref = save_frames(frames, store, "video", fps=2.0)
    plan = sandbox.plan(ref)
    assert plan.times_s == (0.0, 0.5, 1.0, 1.5, 2.0)
    np.testing.assert_array_equal(sandbox.decode(ref, plan, [1, 3]).frames, frames[[1, 3]])
    image = save_frames(frames[0], store, "image")
    np.testing.assert_array_equal(sandbox.decode(image, sandbox.plan(image)).frames, frames[:1])


def test_an_array_is_one_file_as_long_as_somebody_holds_it(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    first, second = (save_frames(frames, store, "video", fps=fps) for fps in (1.0, 2.0))
    assert first.path == second.path
    assert first.digest == file_digest(first.path)
    store.release(first.path)
    assert np.array_equal(np.load(second.path), frames)
    store.release(second.path)
    assert list(tmp_path.glob("*.npy")) == []


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 3), dtype=np.float32),
        np.zeros((2, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 4, 3), dtype=np.uint8),
        np.array([{"x": 1}], dtype=object),
    ],
)
def test_other_arrays_are_refused(
    sandbox: Sandbox, tmp_path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> None:
    np.save(tmp_path / "frames.npy", array, allow_pickle=True)
    with pytest.raises(MediaError):
        sandbox.plan(reference(tmp_path / "frames.npy"))
    if array.dtype == np.float32:
        store = ContentStore(tmp_path)
        with pytest.raises(BadRequest, match="uint8"):
            save_frames(array, store, "video", fps=1.0)  # type: ignore[arg-type]  # the wrong type is the test


def test_damage_is_reported_as_lost_positions(sandbox: Sandbox, tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.ts", gop=6)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 188 * 4] = b"\x47" + b"\xff" * (188 * 4 - 1)
    path.write_bytes(content)
    ref = reference(path)
    plan = sandbox.plan(ref)
    decoded = sandbox.decode(ref, plan)
    assert set(decoded.lost) | set(decoded.positions) == set(range(plan.num_frames))
    assert len(decoded.frames) == len(decoded.positions) > 0


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, b"\x00\x00\x00\x18ftypisom" + b"\xff" * 64])
def test_nonsense_is_a_media_error_in_our_words(sandbox: Sandbox, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    before = pid_of(sandbox)
    for modality in ("image", "video"):
        with pytest.raises(MediaError) as caught:
            sandbox.plan(reference(path, "image" if modality == "image" else "video"))
        assert str(tmp_path) not in caught.value.public_message
        assert "0x" not in caught.value.public_message
    assert pid_of(sandbox) == before


def test_options_are_checked_and_limits_named(frames_dir: Path, tmp_path: Path) -> None:
    sandbox = Sandbox(frames_dir, MediaLimits(max_frames=8, max_decoded_bytes=64 * 48 * 3 * 4))
    ref = reference(make_video(tmp_path / "clip.mp4"))
    try:
        plan = sandbox.plan(reference_with(ref.path, MediaOptions(num_frames=8)))
        with pytest.raises(MediaError, match="at most 8 sampled frames, but got 24"):
            sandbox.plan(reference_with(ref.path, MediaOptions(fps=12)))
        with pytest.raises(BadRequest, match="either"):
            sandbox.plan(reference_with(ref.path, MediaOptions(fps=1, num_frames=1)))
        assert len(sandbox.decode(ref, plan, range(4)).frames) == 4
        with pytest.raises(MediaError, match="bytes of frames at once"):
            sandbox.decode(ref, plan, range(5))
        with pytest.raises(MediaError, match="positions from 0 to 7"):
            sandbox.decode(ref, plan, [8])
    finally:
        sandbox.close()


def reference_with(path: str, options: MediaOptions) -> MediaRef:
    return MediaRef(modality="video", path=path, digest="0" * 64, source="clip", options=options)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGXCPU])
def test_after_a_death_the_next_job_works_within_a_second(
    sandbox: Sandbox, tmp_path: Path, number: int
) -> None:
    ref = reference(make_video(tmp_path / "clip.mp4"))
    plan = sandbox.plan(ref)
    os.kill(pid_of(sandbox), number)
    with pytest.raises(MediaError, match="made the decoder fail"):
        sandbox.decode(ref, plan)
    began = time.perf_counter()
    assert len(sandbox.decode(ref, plan).frames) == 24
    assert time.perf_counter() - began < 5  # 0.3 s where nothing else runs


def test_a_hanging_decoder_is_killed_at_its_deadline(frames_dir: Path, tmp_path: Path) -> None:
    """R13: the wall deadline."""
    sandbox = Sandbox(frames_dir, MediaLimits(job_deadline_s=1.5))
    try:
        ref = reference(make_video(tmp_path / "clip.mp4", frames=4))
        sandbox.plan(ref)
        os.kill(pid_of(sandbox), signal.SIGSTOP)
        with pytest.raises(MediaError, match=r"within 1\.5 s"):
            sandbox.plan(ref)
        assert sandbox.plan(ref).num_frames == 4
    finally:
        sandbox.close()


def test_threads_take_turns(sandbox: Sandbox, tmp_path: Path) -> None:
    ref = reference(make_video(tmp_path / "clip.mp4"))
    plan = sandbox.plan(ref)
    shades: dict[int, int] = {}

    def decode(position: int) -> None:
        shades[position] = shade_of(sandbox.decode(ref, plan, [position]).frames[0])

    threads = [threading.Thread(target=decode, args=(position,)) for position in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(abs(shades[position] - shade(position)) <= 4 for position in range(8))


def test_the_process_outlives_the_thread_that_called(sandbox: Sandbox, tmp_path: Path) -> None:
    ref = reference(make_video(tmp_path / "clip.mp4"))
    os.kill(pid_of(sandbox), signal.SIGKILL)

    def fail() -> None:
        with pytest.raises(MediaError):
            sandbox.plan(ref)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    before = pid_of(sandbox)
    assert sandbox.plan(ref).num_frames == 24
    assert pid_of(sandbox) == before


def test_the_process_is_replaced_after_its_share_of_jobs(frames_dir: Path, tmp_path: Path) -> None:
    """R13: recycled."""
    sandbox = Sandbox(frames_dir, MediaLimits(process_jobs=2))
    try:
        ref = reference(make_video(tmp_path / "clip.mp4", frames=4))
        pids = []
        for _ in range(4):
            pids.append(pid_of(sandbox))
            sandbox.plan(ref)
        assert pids[0] == pids[1] != pids[2] == pids[3]
    finally:
        sandbox.close()


def test_close_kills_and_is_final(frames_dir: Path, tmp_path: Path) -> None:
    sandbox = Sandbox(frames_dir, LIMITS)
    pid = pid_of(sandbox)
    sandbox.close()
    sandbox.close()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(Unavailable):
        sandbox.plan(reference(make_video(tmp_path / "clip.mp4", frames=2)))


def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys; from mmserve.media.sandbox import Sandbox; s = Sandbox(sys.argv[1]);"
        "print(s._thread.submit(s._start).result()._popen.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert wait_gone(int(parent.stdout))


def wait_gone(pid: int) -> bool:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        status = Path(f"/proc/{pid}/stat")
        # without a reaper it stays as a zombie
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
    return False


def confined(code: str) -> object:
    """What a process can still do after it gave up its rights."""
    setup = (
        "import json, os, socket, subprocess, threading; from mmserve.media import confine;"
        "from mmserve.media.limits import MediaLimits;"
        "confine.die_with_parent(os.getppid());"
        "confine.limit_resources(MediaLimits(process_memory_bytes=1 << 30));"
        "refused = confine.refuse_system_calls()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", setup + code], stdout=subprocess.PIPE, check=True, timeout=30
    )
    return json.loads(done.stdout)


ATTEMPTS = """
results = {}
def attempt(name, action):
    try:
        action()
        results[name] = "done"
    except BaseException as error:
        results[name] = type(error).__name__
attempt("socket", lambda: socket.socket())
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("fork", lambda: os.fork() or os._exit(0))
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("memory", lambda: bytearray(2 << 30))
thread = threading.Thread(target=lambda: None)
attempt("thread", thread.start)
print(json.dumps({"refused": refused, **results}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="rights are taken away by Linux' seccomp")
def test_a_confined_process_has_no_network_no_children_and_little_memory() -> None:
    """R13: no sockets, no fork, no exec, no signals, little memory."""
    assert confined(ATTEMPTS) == {
        "refused": True,
        "socket": "PermissionError",
        "exec": "PermissionError",
        "fork": "PermissionError",
        "kill": "PermissionError",
        "memory": "MemoryError",
        "thread": "done",
    }


def test_endless_computing_is_ended_by_the_kernel() -> None:
    """R13: RLIMIT_CPU."""
    code = "from mmserve.media import confine; confine.allow_cpu(0)\nwhile True: pass"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGXCPU


def test_the_process_sees_no_environment_and_few_files(sandbox: Sandbox) -> None:
    """R13: nothing of the worker's is open in it."""
    environment = Path(f"/proc/{pid_of(sandbox)}/environ").read_bytes()
    names = {entry.split(b"=")[0] for entry in environment.split(b"\0") if entry}
    assert names <= {
        b"PYTHONPATH",
        b"PYTHONNOUSERSITE",
        b"OPENBLAS_NUM_THREADS",
        b"OMP_NUM_THREADS",
        b"LC_CTYPE",
    }
    memory = resource.prlimit(pid_of(sandbox), resource.RLIMIT_AS)[0]
    assert 0 < memory - LIMITS.process_memory_bytes < 2 << 30  # what libraries have mapped comes on top
    with socket.socket() as ours:
        assert ours.fileno() > 2
        open_files = os.listdir(f"/proc/{pid_of(sandbox)}/fd")
        assert len(open_files) <= 8


def test_neither_side_imports_torch_and_ours_no_decoder() -> None:
    code = (
        "import sys, json; import mmserve.media.sandbox; ours = set(sys.modules);"
        "import mmserve.media.jobs; decoders = {'torch', 'av', 'PIL'};"
        "print(json.dumps([sorted(decoders & ours), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout) == [[], False]


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x81\xa4type\xa7unknown", b"\xdd\xff\xff\xff\xff", b"\xa3\xff\xff\xff"]
)
def test_malformed_messages_are_wire_errors(body: bytes) -> None:
    with pytest.raises(WireError):
        protocol.unpack_reply(body)
    with pytest.raises(WireError):
        protocol.unpack_job(body)


def test_messages_have_a_size_limit() -> None:
    with pytest.raises(WireError, match="at most"):
        protocol.body_length(b"\xff\xff\xff\xff")
