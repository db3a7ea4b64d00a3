"""queues.py: processes that stand still for seconds, and go on (R5, R34)."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import pytest

from mmserve.queues import CurveKeys, Router, ipc_endpoint, make_keys

STOPPED_S = 5.0  # longer than heartbeats allow
ECHO = """
import sys, msgspec
from mmserve.queues import CurveKeys, Dealer
keys = msgspec.json.decode(sys.argv[2], type=CurveKeys | None)
with Dealer(sys.argv[1], b"w", keys) as dealer:
    dealer.send(b"hello")
    while True:
        for frame in dealer.poll(1.0):
            dealer.send(frame)
"""


def receive(router: Router, count: int) -> list[bytes]:
    got: list[bytes] = []
    until = time.monotonic() + 20
    while len(got) < count and time.monotonic() < until:
        got += [frame for _, frame in router.poll(0.1)]
    return got


@pytest.mark.slow
@pytest.mark.parametrize("keys", [None, make_keys()], ids=["ipc", "curve"])
def test_what_is_sent_to_a_process_that_stands_still_arrives(keys: CurveKeys | None) -> None:
    """What is lost on the way to a worker that lives would be waited for until the deadline."""
    with tempfile.TemporaryDirectory(prefix="mmq-", dir="/tmp") as private:
        endpoint = ipc_endpoint(Path(private)) if keys is None else "tcp://127.0.0.1:0"
        with Router(endpoint, keys) as router:
            known = msgspec.json.encode(keys).decode()
            process = subprocess.Popen([sys.executable, "-c", ECHO, router.endpoint, known])
            try:
                assert receive(router, 1) == [b"hello"]
                process.send_signal(signal.SIGSTOP)
                assert router.send(b"w", b"early")
                until = time.monotonic() + STOPPED_S
                while time.monotonic() < until:
                    assert router.poll(0.1) == []
                assert router.send(b"w", b"late")
                process.send_signal(signal.SIGCONT)
                assert receive(router, 2) == [b"early", b"late"]
            finally:
                process.kill()
                process.wait()
