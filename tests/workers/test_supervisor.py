"""Supervisor on real, trivial processes: restarts with a pause, a breaker, orders to kill, companions."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

import mmserve
from mmserve import messages as m
from mmserve.config import MethodDefaults, ServeConfig, Transfer
from mmserve.media.limits import MediaLimits
from mmserve.messages import Role
from mmserve.queues import Router, ipc_endpoint
from mmserve.workers import supervisor
from mmserve.workers.dispatcher import SUPERVISOR
from mmserve.workers.main import CANNOT_START, WorkerConfig
from mmserve.workers.process import Backoff, Child
from mmserve.workers.supervisor import COMMANDS, EVENTS, Supervisor, meeting_point, worker_configs

# ends at once with an exit code, or waits to be ended
CHILD = """
import sys, time
from mmserve.workers.process import receive_config
config = receive_config(dict[str, str])
if config["code"]:
    sys.exit(int(config["code"]))
time.sleep(600)
"""


class Recorder:
    """Starts a trivial process in place of a worker; `codes` says which exit at once, by slot."""

    def __init__(self) -> None:
        self.codes: dict[str, str] = {}
        self.started: list[tuple[str, float]] = []
        self.configs: list[WorkerConfig] = []
        self.env: Mapping[str, str] = {}
        self.children: dict[str, Child] = {}

    def start(self, module: str, config: WorkerConfig, *, name: str, env: Mapping[str, str]) -> Child:
        assert module == "mmserve.workers.main"
        assert config.name == name
        self.started.append((name, time.monotonic()))
        self.configs.append(config)
        self.env = env
        child = Child.start("a_child", {"code": self.codes.get(name.rpartition("-")[0], "")}, name=name)
        self.children[name] = child
        return child

    def names(self) -> list[str]:
        return [name for name, _ in self.started]


class World:
    """A supervisor on a thread of its own, with the test as its dispatcher."""

    def __init__(self, directory: Path, slots: tuple[str, ...], companions: tuple[Child, ...] = ()) -> None:
        self.router = Router(ipc_endpoint(directory))
        configs = [
            WorkerConfig(
                name=slot,
                roles=(Role.DECODE,),
                endpoint=self.router.endpoint,
                directories=(),
                model="m",
                threads=3,
            )
            for slot in slots
        ]
        self.gave_up: list[str] = []
        self.stop = threading.Event()
        self.supervisor = Supervisor(configs, self.gave_up.append, companions)
        for slot in self.supervisor._slots:
            slot.backoff = Backoff(first_s=0.02, chance=lambda: 0.0)
        self.thread = threading.Thread(target=self.supervisor.run, args=(self.stop.is_set,))
        self.thread.start()
        self.deaths: list[m.WorkerDied] = []

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            for _, frame in self.router.poll(0.02):
                event = EVENTS.decode(frame).event
                assert isinstance(event, m.WorkerDied)
                self.deaths.append(event)

    def order(self, *frames: bytes) -> None:
        for frame in frames:
            self.until(lambda frame=frame: self.router.send(SUPERVISOR.encode(), frame))  # type: ignore[misc]

    def close(self) -> None:
        self.stop.set()
        self.thread.join(15)
        assert not self.thread.is_alive()
        self.router.close()


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    (tmp_path / "a_child.py").write_text(CHILD)
    tmp_path.chmod(0o700)
    root = Path(mmserve.__path__[0]).parent
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{tmp_path}")
    made = Recorder()
    monkeypatch.setattr(supervisor, "Child", made)
    return made


@pytest.fixture
def start(tmp_path: Path, recorder: Recorder) -> Iterator[Callable[..., World]]:
    worlds = []

    def make(*slots: str, companions: tuple[Child, ...] = ()) -> World:
        worlds.append(World(tmp_path, slots, companions))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    for child in recorder.children.values():
        assert not child.is_running, "a worker outlives its supervisor"


def kill_order(worker: str) -> bytes:
    return COMMANDS.encode(m.Downward(epoch="e", number=0, command=m.KillWorker(worker=worker)))


def test_every_slot_gets_a_process_that_ends_with_the_supervisor(
    start: Callable[..., World], recorder: Recorder
) -> None:
    world = start("prefill-0", "decode-0")
    world.until(lambda: len(recorder.children) == 2)
    assert recorder.names() == ["prefill-0-1", "decode-0-1"]
    assert recorder.env["OMP_NUM_THREADS"] == "3"
    assert all(child.is_running for child in recorder.children.values())
    world.close()
    assert not world.deaths
    assert not world.gave_up
    world.router = Router(world.router.endpoint)  # for the fixture, which closes once more


def test_a_death_is_reported_and_the_slot_starts_again_under_a_new_name(
    start: Callable[..., World], recorder: Recorder
) -> None:
    world = start("decode-0", "decode-1")
    world.until(lambda: len(recorder.children) == 2)
    os.kill(recorder.children["decode-0-1"].pid, signal.SIGSEGV)
    world.until(lambda: bool(world.deaths) and len(recorder.children) == 3)
    assert world.deaths == [m.WorkerDied(worker="decode-0-1", signal=signal.SIGSEGV, by_supervisor=False)]
    assert recorder.names() == ["decode-0-1", "decode-1-1", "decode-0-2"]
    # everything but the name stays
    first, again = recorder.configs[0], recorder.configs[2]
    assert msgspec.structs.replace(first, name=again.name) == again
    assert recorder.children["decode-1-1"].is_running


def test_a_worker_that_dies_at_once_is_restarted_slower_and_slower_then_given_up(
    start: Callable[..., World], recorder: Recorder
) -> None:
    recorder.codes["decode-0"] = "1"
    world = start("decode-0", "decode-1")
    world.until(lambda: bool(world.gave_up) and len(world.deaths) == 5)
    assert world.gave_up == ["Worker decode-0 died too often to be started again"]
    at = [at for name, at in recorder.started if name.startswith("decode-0")]
    assert len(at) == 5
    assert all(event.signal == 0 and not event.by_supervisor for event in world.deaths)
    for pause, (before, after) in enumerate(pairwise(at)):
        assert after - before >= 0.02 * 2**pause
    # the breaker stays open, the other slot goes on
    for _ in range(5):
        world.router.poll(0.05)
    assert len(recorder.children) == 6
    assert recorder.children["decode-1-1"].is_running


def test_a_worker_that_cannot_start_is_not_started_again(
    start: Callable[..., World], recorder: Recorder
) -> None:
    recorder.codes["decode-0"] = str(CANNOT_START)
    world = start("decode-0", "decode-1")
    world.until(lambda: bool(world.gave_up))
    assert world.gave_up == ["Worker decode-0 cannot start; its log says why"]
    for _ in range(4):
        world.router.poll(0.05)
    assert recorder.names() == ["decode-0-1", "decode-1-1"]


def test_a_hung_worker_is_killed_on_order_and_nobody_is_blamed(
    start: Callable[..., World], recorder: Recorder
) -> None:
    world = start("decode-0", "decode-1")
    world.until(lambda: len(recorder.children) == 2)
    hung = recorder.children["decode-0-1"]
    os.kill(hung.pid, signal.SIGSTOP)
    not_for_it = COMMANDS.encode(m.Downward(epoch="e", number=0, command=m.CancelRequest(request_id="r")))
    world.order(b"\xc1 noise", not_for_it, kill_order("decode-9-9"), kill_order("decode-0-1"))
    world.until(lambda: bool(world.deaths) and len(recorder.children) == 3)
    assert world.deaths == [m.WorkerDied(worker="decode-0-1", signal=signal.SIGKILL, by_supervisor=True)]
    # an order that comes too late finds the name gone
    world.order(kill_order("decode-0-1"))
    for _ in range(3):
        world.router.poll(0.05)
    assert recorder.children["decode-0-2"].is_running
    assert recorder.children["decode-1-1"].is_running


def test_the_death_of_a_companion_is_the_end(start: Callable[..., World], recorder: Recorder) -> None:
    companion = Child.start("a_child", {"code": "4"}, name="api")
    world = start("decode-0", companions=(companion,))
    world.until(lambda: bool(world.gave_up))
    assert world.gave_up == ["The api process ended (exit code 4)"]
    assert recorder.names() == ["decode-0-1"], "a companion is not started again"
    assert not world.deaths


def test_cores_are_divided_and_settings_reach_every_worker() -> None:
    config = ServeConfig(model="m", epd=(1, 2, 1), threads=None)
    made = worker_configs(config, "ipc:///run/x", ["/run/a", "/run/b"])
    assert [worker.name for worker in made] == ["encode-0", "prefill-0", "prefill-1", "decode-0"]
    assert [worker.roles for worker in made] == [
        (Role.ENCODE,),
        (Role.PREFILL,),
        (Role.PREFILL,),
        (Role.DECODE,),
    ]
    assert {worker.threads for worker in made} == {max(1, (os.cpu_count() or 1) // 4)}
    assert all(worker.directories == ("/run/a", "/run/b") for worker in made)
    assert all(worker.limits == MediaLimits.from_config(config.limits) for worker in made)
    assert all(worker.kv_memory_bytes == config.cache.kv_memory_bytes for worker in made)
    assert all(worker.kv_dtype == "auto" for worker in made)
    assert all(worker.overlap for worker in made)
    quantized = MethodDefaults(kv_dtype="int8")
    chosen = worker_configs(replace(config, threads=5, overlap=False, methods=quantized), "ipc:///run/x", [])
    assert all(worker.kv_dtype == "int8" for worker in chosen)
    assert {worker.threads for worker in chosen} == {5}
    assert not any(worker.overlap for worker in chosen)


def test_the_tcp_plane_gives_every_worker_the_same_keys_and_one_meeting_point(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint, keys = meeting_point(ServeConfig(), tmp_path)
    assert endpoint.startswith("ipc://")
    assert keys is None
    config = ServeConfig(host="0.0.0.0", transfer=Transfer(plane="tcp"))  # never bound
    endpoint, keys = meeting_point(config, tmp_path)
    assert endpoint.startswith("tcp://127.0.0.1:"), "not the public host's address"
    assert keys is not None
    made = worker_configs(config, endpoint, [], keys)
    assert all(worker.keys == keys and worker.endpoint == endpoint for worker in made)
    assert all(worker.transfer == config.transfer for worker in made)
