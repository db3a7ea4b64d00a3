"""A real Redis or Valkey server for tests, started and stopped at will.

The program is the machine's own (`apt-get install redis-server`); without one these tests are skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import redis

WAIT_S = 10.0


class Server:
    """A real server on a socket file, started and stopped at will."""

    def __init__(self, program: str, directory: Path) -> None:
        self._program = program
        self._path = directory / "s"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._path}"

    def start(self, *options: str) -> None:
        command = [self._program, "--port", "0", "--unixsocket", str(self._path), "--save", "", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self._path.parent)
        deadline = time.monotonic() + WAIT_S
        with closing(self.client()) as client:
            while True:
                with suppress(redis.ConnectionError):
                    client.ping()
                    return
                assert time.monotonic() < deadline, "the server does not answer"
                assert self._process.poll() is None, "the server ended"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._path.unlink(missing_ok=True)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)


@contextmanager
def real_server() -> Iterator[Server]:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("no redis-server and no valkey-server here; on Debian: apt-get install redis-server")
    with TemporaryDirectory() as directory:  # the path of a socket must be short
        server = Server(program, Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.stop()
