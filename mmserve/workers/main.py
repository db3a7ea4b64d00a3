"""A worker process: `python -m mmserve.workers.main`, configuration on stdin, one loop until told to stop.

The same handlers run on a thread of another process when stages are colocated (`run_worker`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mmserve.config import EmbeddingTiers, KVDtype, Transfer
from mmserve.errors import ConfigError
from mmserve.log import setup_logging
from mmserve.media.limits import MediaLimits
from mmserve.messages import LeasesEvicted, Role
from mmserve.queues import CurveKeys, Dealer, Router, tcp_endpoint
from mmserve.workers.process import receive_config

if TYPE_CHECKING:
    import torch

    from mmserve.models.loader import Checkpoint
    from mmserve.transfer import LeaseReader, LeaseStore
    from mmserve.workers.loop import Handler, Reporter


logger = logging.getLogger(__name__)
TOKEN_BUDGETS = {"cpu": 512, "cuda": 8192}  # on a CPU, more rows fall out of its caches
CPU_KV_MEMORY = 1 << 30
GPU_STEP_MEMORY = 2 << 30  # what a step needs beside weights and pages
MAX_TOLD = 4096  # lease ids in one message
CANNOT_START = 3  # exit code: the configuration is wrong, whoever runs it


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything one worker needs to know; resolved by the supervisor."""

    name: str
    roles: tuple[Role, ...]
    endpoint: str
    directories: tuple[str, ...]  # where leases and decoded frames may lie, the preferred place first
    model: str
    dtype: str = "auto"
    threads: int = 1
    kv_memory_bytes: int | None = None
    kv_dtype: KVDtype = "auto"
    kv_budget: float | None = 1.0  # of the deployment's KV policy; None: what it keeps by default
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int | None = None
    embedding_cache_bytes: int = 256 << 20
    embedding_tiers: EmbeddingTiers = EmbeddingTiers()
    page_size: int = 32
    overlap: bool = True
    transfer: Transfer = Transfer()
    keys: CurveKeys | None = None  # of the tcp plane
    limits: MediaLimits = MediaLimits()


def run_worker(config: WorkerConfig, should_stop: Callable[[], bool]) -> None:
    """Load what the roles need and serve until `should_stop`; everything is released on return."""
    from mmserve.kernels import native
    from mmserve.models.loader import load_checkpoint, weights_revision
    from mmserve.workers.loop import WorkerLoop

    checkpoint = load_checkpoint(config.model, config.dtype, _device())
    if checkpoint.device == "cpu":
        native.load_all()
    directories = tuple(map(Path, config.directories))
    with ExitStack() as stack:
        dealer = stack.enter_context(Dealer(config.endpoint, config.name.encode(), config.keys))
        leases, reader = _open_plane(config, directories, stack)
        revision = weights_revision(checkpoint.path)
        loop = WorkerLoop(dealer, revision, os.getpid())
        handlers: list[Handler] = []
        if Role.ENCODE in config.roles:
            handlers.append(_encode_handler(config, checkpoint, revision, leases, reader, loop, stack))
        language = tuple(role for role in config.roles if role is not Role.ENCODE)
        if language:
            handlers.append(_language_handler(config, checkpoint, leases, reader, loop, language))
        loop.run(handlers, should_stop, lambda: _evict(leases, loop))
        dealer.flush(1.0)


def _open_plane(
    config: WorkerConfig, directories: Sequence[Path], stack: ExitStack
) -> tuple[LeaseStore, LeaseReader]:
    """What this worker publishes with, and what it reads others' with."""
    from mmserve.frames import FrameReader, FrameServer
    from mmserve.transfer import LeaseStore, MappedLeases

    ttl_s = config.transfer.lease_ttl_s
    if config.keys is None:
        return stack.enter_context(LeaseStore(directories, ttl_s=ttl_s)), MappedLeases(directories)
    router = Router(tcp_endpoint(config.transfer.address), config.keys)
    leases = stack.enter_context(LeaseStore(directories, ttl_s=ttl_s, endpoint=router.endpoint))
    stack.enter_context(FrameServer(leases, router))
    return leases, stack.enter_context(FrameReader(config.keys))


def _evict(leases: LeaseStore, reporter: Reporter) -> None:
    """Give up what nobody has read in time, and say so."""
    evicted = tuple(leases.sweep())
    for start in range(0, len(evicted), MAX_TOLD):
        reporter.emit(LeasesEvicted(lease_ids=evicted[start : start + MAX_TOLD]))


def _encode_handler(
    config: WorkerConfig,
    checkpoint: Checkpoint,
    revision: str,
    leases: LeaseStore,
    reader: LeaseReader,
    reporter: Reporter,
    stack: ExitStack,
) -> Handler:
    from mmserve.encoders.tiers.open import open_cache
    from mmserve.media.pool import SandboxPool
    from mmserve.media.preprocess import Preprocessing
    from mmserve.models.layout.llava_onevision import Geometry
    from mmserve.models.loader import load_vision
    from mmserve.workers.encode import EncodeHandler
    from mmserve.workers.items import Tools

    vision = load_vision(checkpoint)
    cache = open_cache(config.embedding_cache_bytes, config.embedding_tiers, vision.newline)
    stack.callback(cache.close)
    sandbox = SandboxPool(Path(config.directories[0]), config.limits)
    stack.callback(sandbox.close)
    tools = Tools(
        vision=vision,
        geometry=Geometry.from_config(checkpoint.config.to_dict()),
        preprocessing=Preprocessing.from_model_dir(checkpoint.path),
        weights_revision=revision,
        sandbox=sandbox,
        cache=cache,
        leases=leases,
        reporter=reporter,
        overlap=config.overlap,
        wire_dtype=config.transfer.wire_dtype,
    )
    return EncodeHandler(tools, reader)


def _language_handler(
    config: WorkerConfig,
    checkpoint: Checkpoint,
    leases: LeaseStore,
    reader: LeaseReader,
    reporter: Reporter,
    roles: tuple[Role, ...],
) -> Handler:
    import torch

    from mmserve.engine.memory import make_runner
    from mmserve.models.chat import ChatFormat
    from mmserve.models.loader import load_decoder
    from mmserve.workers.language import LanguageHandler

    chat = ChatFormat.from_model_dir(checkpoint.path)
    decoder, device = load_decoder(checkpoint), torch.device(checkpoint.device)
    runner = make_runner(
        decoder,
        kv_dtype=config.kv_dtype,
        memory=_kv_memory(config, device),
        page_size=config.page_size,
        dtype=checkpoint.dtype,
        device=checkpoint.device,
        prefills=Role.PREFILL in roles,
        decodes=Role.DECODE in roles,
        kv_budget=config.kv_budget,
    )
    return LanguageHandler(
        runner=runner,
        roles=roles,
        media_tokens=(chat.image_token, chat.video_token),
        eos_tokens=chat.eos_tokens,
        leases=leases,
        reader=reader,
        reporter=reporter,
        token_budget=config.max_num_batched_tokens or TOKEN_BUDGETS[device.type],
    )


def _kv_memory(config: WorkerConfig, device: torch.device) -> int:
    """Bytes for KV pages: as configured, or on a GPU what the weights and one step leave of its share."""
    import torch

    if config.kv_memory_bytes is not None:
        return config.kv_memory_bytes
    if device.type != "cuda":
        return CPU_KV_MEMORY
    _, total = torch.cuda.mem_get_info(device)
    # by its own share, whatever others on this GPU have taken so far
    left = int(config.gpu_memory_utilization * total) - torch.cuda.memory_allocated(device) - GPU_STEP_MEMORY
    if left <= 0:
        raise ConfigError(
            f"Expected room for KV pages within a share of {config.gpu_memory_utilization:.2f} of the GPU's "
            f"{total >> 20} MiB, but weights and steps take all of it"
        )
    return left


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    config = receive_config(WorkerConfig)
    setup_logging()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # an interactive interrupt goes to the whole group: the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(config.threads)
    try:
        run_worker(config, stop.is_set)
    except ConfigError as error:
        # starting again would end the same way
        logger.error("worker %s cannot start: %s", config.name, error.public_message)
        sys.exit(CANNOT_START)


if __name__ == "__main__":
    main()
