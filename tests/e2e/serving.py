"""`mmserve serve` for tests: real processes with a configuration of their own, and what they count."""

from __future__ import annotations

import base64
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

START_S = 300.0
STOP_S = 40.0
_METRIC = re.compile(r"mmserve_(\w+?)(?:_total)?\{(.*)\} (\S+)")


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def ask(
        self,
        *parts: Mapping[str, Any],
        text: str = "How many objects are there?",
        timeout_s: float = 120.0,
        **body: Any,  # noqa: ANN401  # fields of any kind
    ) -> httpx.Response:
        content = [*parts, {"type": "text", "text": text}]
        body = {"max_tokens": 4, "messages": [{"role": "user", "content": content}], **body}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=timeout_s, trust_env=False)

    def counts(self) -> dict[str, float]:
        """Metrics by name and labels: `encode_events/frames_decoded`, `embedding_cache_events/hits/disk`."""
        found = {}
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        for name, labels, value in _METRIC.findall(text):
            found["/".join([name, *re.findall(r'="([^"]*)"', labels)])] = float(value)
        return found

    def settled(self, timeout_s: float = 20.0) -> dict[str, float]:
        """The counts when nothing is left to encode and two looks, a while apart, agree."""
        until = time.monotonic() + timeout_s
        before: dict[str, float] = {}
        while True:
            counts = {name: count for name, count in self.counts().items() if name.startswith("e")}
            is_idle = counts.get("encode_now/items_open") == counts.get("encode_now/items_waiting") == 0
            if is_idle and counts == before:
                return counts
            assert time.monotonic() < until, f"it does not come to rest: {counts}"
            before = counts
            time.sleep(0.4)

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


@contextmanager
def serving(folder: Path, settings: Mapping[str, Any] | None = None) -> Iterator[Served]:
    """A server that is ready; it is drained, or killed when a test has failed."""
    config = folder / f"serve-{time.monotonic_ns()}.yaml"
    config.write_text(yaml.safe_dump({"port": 0, **(settings or {})}))
    command = [sys.executable, "-m", "mmserve", "serve", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        served = Served(process, "")
        listening = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                served.log.append(line)
                if found := re.search(r"url=(http://\S+)", line):
                    served.url = found[1]
                    listening.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            assert listening.wait(START_S), "".join(served.log)
            _wait_ready(served)
            yield served
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0, "".join(served.log[-20:])
        finally:
            if process.poll() is None:
                process.kill()
            reader.join(10)


def video_part(path: Path) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url("video/mp4", path.read_bytes())}}


def image_part(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(kind, data)}}


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _wait_ready(served: Served) -> None:
    until = time.monotonic() + START_S
    while httpx.get(f"{served.url}/readyz", trust_env=False).status_code != 200:
        assert time.monotonic() < until, "".join(served.log[-20:])
        time.sleep(0.1)
