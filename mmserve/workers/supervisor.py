"""Starts worker processes, notices their death at once, and starts them again.

Speaks to the dispatcher as one more peer: reports deaths, takes orders to kill what hangs. Holds no
model, no HTTP and no torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mmserve import messages as m
from mmserve.config import ServeConfig
from mmserve.cores import usable_cores
from mmserve.errors import WireError
from mmserve.media.limits import MediaLimits
from mmserve.messages import Role
from mmserve.queues import CurveKeys, Dealer, free_endpoint, ipc_endpoint, make_keys
from mmserve.wire import Codec
from mmserve.workers.dispatcher import SUPERVISOR
from mmserve.workers.main import CANNOT_START, WorkerConfig
from mmserve.workers.process import Backoff, Child, ProcessWatcher

logger = logging.getLogger(__name__)
POLL_S = 0.05
STOP_GRACE_S = 3.0

COMMANDS: Codec[m.Downward] = Codec(m.Downward)
EVENTS: Codec[m.Upward] = Codec(m.Upward)
ENCODER_GPU_SHARE = 0.1


def meeting_point(config: ServeConfig, run_directory: Path) -> tuple[str, CurveKeys | None]:
    """Where the dispatcher will be reached, and the keys that its workers need for that."""
    if config.transfer.plane == "tcp":
        return free_endpoint(config.transfer.address), make_keys()
    return ipc_endpoint(run_directory), None


def worker_configs(
    config: ServeConfig, endpoint: str, directories: Sequence[str], keys: CurveKeys | None = None
) -> list[WorkerConfig]:
    """One configuration per process of an E|P|D deployment; cores are divided among them."""
    counts = dict(zip(Role, config.epd, strict=True))
    cores = usable_cores()
    threads = config.threads or max(1, cores // sum(counts.values()))
    return [
        WorkerConfig(
            name=f"{role}-{slot}",
            roles=(role,),
            endpoint=endpoint,
            directories=tuple(directories),
            model=config.model,
            dtype=config.dtype,
            threads=threads,
            kv_memory_bytes=config.cache.kv_memory_bytes,
            kv_dtype=config.methods.kv_dtype,
            kv_budget=1.0 if config.methods.kv == "none" else config.methods.kv_budget,
            gpu_memory_utilization=_gpu_share(config),
            max_num_batched_tokens=config.max_num_batched_tokens,
            embedding_cache_bytes=config.cache.embedding_cache_bytes,
            embedding_tiers=config.cache.embedding_tiers,
            overlap=config.overlap,
            transfer=config.transfer,
            keys=keys,
            limits=MediaLimits.from_config(config.limits, config.video_backend),
        )
        for role, count in counts.items()
        for slot in range(count)
    ]


def _gpu_share(config: ServeConfig) -> float:
    """What one language worker may fill when all processes are on one GPU: encoders need little."""
    encoders, prefills, decodes = config.epd
    left = config.cache.gpu_memory_utilization - ENCODER_GPU_SHARE * encoders
    return max(left, 0.0) / (prefills + decodes)


@dataclass(slots=True)
class _Slot:
    """One place in the deployment: the process in it changes, its work and its cache key do not."""

    config: WorkerConfig
    backoff: Backoff = field(default_factory=Backoff)
    generation: int = 0
    child: Child | None = None
    start_at: float = 0.0


class Supervisor:
    """Keeps one process alive per slot until `run` is told to stop.

    `companions` are processes that nothing can go on without, such as the API: they are not started
    again. `give_up` is called with a sentence when one of them dies, or a slot's process too often.
    """

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        give_up: Callable[[str], None],
        companions: Sequence[Child] = (),
    ) -> None:
        self._slots = [_Slot(config) for config in configs]
        self._give_up = give_up
        self._companions = companions
        self._endpoint, self._keys = configs[0].endpoint, configs[0].keys

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Call on a thread that outlives the workers: the kernel ends them with it."""
        with ProcessWatcher() as watcher, self._dealer() as dealer:
            for companion in self._companions:
                watcher.watch(companion)
            while not should_stop():
                self._start_due(watcher)
                for child in watcher.poll(POLL_S):
                    if child in self._companions:
                        self._give_up(f"The {child.name} process ended (exit code {child.exit_code})")
                    else:
                        self._report(dealer, child)
                for frame in dealer.poll(0.0):
                    self._obey(frame)
            watcher.stop_all(STOP_GRACE_S)

    def _dealer(self) -> Dealer:
        return Dealer(self._endpoint, SUPERVISOR.encode(), self._keys)

    def _start_due(self, watcher: ProcessWatcher) -> None:
        for slot in self._slots:
            if slot.child is None and not slot.backoff.is_open and time.monotonic() >= slot.start_at:
                slot.generation += 1
                name = f"{slot.config.name}-{slot.generation}"
                config = msgspec.structs.replace(slot.config, name=name)
                slot.child = Child.start(
                    "mmserve.workers.main",
                    config,
                    name=name,
                    # libraries read this before our own code can set their threads
                    env={"OMP_NUM_THREADS": str(config.threads), "HF_HUB_DISABLE_TELEMETRY": "1"},
                )
                slot.backoff.note_ready()
                watcher.watch(slot.child)

    def _report(self, dealer: Dealer, child: Child) -> None:
        slot = next(slot for slot in self._slots if slot.child is child)
        slot.child = None
        pause_s = slot.backoff.note_death()
        logger.warning(
            "worker %s died (signal %d, exit code %d)", child.name, child.exit_signal, child.exit_code
        )
        event = m.WorkerDied(worker=child.name, signal=child.exit_signal, by_supervisor=child.killed_by_us)
        dealer.send(EVENTS.encode(m.Upward(epoch="", seen=0, credits=m.Credits(requests=0), event=event)))
        if child.exit_code == CANNOT_START:
            self._give_up(f"Worker {slot.config.name} cannot start; its log says why")
            slot.start_at = math.inf
        elif pause_s is None:
            self._give_up(f"Worker {slot.config.name} died too often to be started again")
        else:
            slot.start_at = time.monotonic() + pause_s

    def _obey(self, frame: bytes) -> None:
        try:
            command = COMMANDS.decode(frame).command
        except WireError as error:
            logger.warning("dropped a frame: %s", error)
            return
        if isinstance(command, m.KillWorker):
            for slot in self._slots:
                if slot.child is not None and slot.child.name == command.worker:
                    logger.warning("worker %s is silent and will be killed", command.worker)
                    slot.child.kill()
