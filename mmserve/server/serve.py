"""`mmserve serve`: one supervisor process that starts the API, the workers and, if asked, the demo page.

Holds no HTTP and no torch itself. Ends with the exit status for the shell.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec

from mmserve.config import ServeConfig, to_mapping
from mmserve.errors import ConfigError
from mmserve.methods import deployed_methods
from mmserve.models.resolve import resolve
from mmserve.request import Methods
from mmserve.rundir import RunDir
from mmserve.server.main import DEMO_HOME, ApiConfig
from mmserve.workers.process import Child
from mmserve.workers.supervisor import Supervisor, meeting_point, worker_configs

logger = logging.getLogger(__name__)
DRAIN_S = 36.0  # the API's own limit and some seconds to close
POLL_S = 0.05


class _Stop:
    """What was asked of this process: a first signal drains, a second one ends it at once."""

    def __init__(self) -> None:
        self.signals = 0
        self.failure: str | None = None
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1

    def give_up(self, why: str) -> None:
        if self.signals == 0:
            logger.error("%s", why)
            self.failure = why


def check_settings(methods: Methods, model_dir: Path) -> None:
    """Raise ConfigError where a method does not take its settings: that takes a process with torch."""
    if not methods.has_settings:
        return
    asked = [sys.executable, "-m", "mmserve.catalogue", str(model_dir)]
    done = subprocess.run(asked, input=msgspec.json.encode(methods), capture_output=True, check=False)
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(told[-1] if told else f"Checking the methods ended with {done.returncode}")


def serve(config: ServeConfig, *, demo: bool = False) -> int:
    """Serve until a signal; 0 after a drain that was asked for, 1 when a part could not be kept alive."""
    if demo and not (DEMO_HOME / "demo" / "page.py").is_file():
        raise ConfigError("Expected the demo page beside the package, but it is only in a source checkout")
    methods, model_dir = deployed_methods(config), resolve(config.model)
    check_settings(methods, model_dir)
    stop = _Stop()
    with RunDir() as run_dir:
        endpoint, keys = meeting_point(config, run_dir.path)
        directories = [str(directory) for directory in run_dir.directories]
        api = Child.start(
            "mmserve.server.main",
            ApiConfig(
                serve=to_mapping(config),
                endpoint=endpoint,
                directories=tuple(directories),
                model_dir=str(model_dir),
                keys=keys,
                demo=demo,
            ),
            name="api",
        )
        supervisor = Supervisor(worker_configs(config, endpoint, directories, keys), stop.give_up, [api])
        drain_ends_at: float | None = None

        def should_stop() -> bool:
            nonlocal drain_ends_at
            if stop.failure is not None or stop.signals > 1:
                return True
            if stop.signals == 1 and drain_ends_at is None:
                # the workers stay until the API has finished what it admitted
                drain_ends_at = time.monotonic() + DRAIN_S
                api.terminate()
            return drain_ends_at is not None and (not api.is_running or time.monotonic() > drain_ends_at)

        supervisor.run(should_stop)
    return 0 if stop.failure is None else 1
