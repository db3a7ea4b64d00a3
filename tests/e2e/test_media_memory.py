"""Resident memory of a whole server under honest and hostile media: bounded while they come, flat after."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mmserve.media.limits import MediaLimits
from tests.e2e.hostile import Sample, Samples
from tests.e2e.serving import Served, serving

MiB = 1 << 20
REQUESTS = 500
CLIENTS = 12
LEAVES = 25  # one in so many clients goes before it is answered
# what the server may hold at a time beyond itself: bodies, embeddings, KV, and frames decoded ahead
BODIES, EMBEDDINGS, KV, AHEAD = 64 * MiB, 32 * MiB, 64 * MiB, MediaLimits().max_ahead_bytes
BUDGET = BODIES + EMBEDDINGS + KV + AHEAD
SETTINGS: dict[str, Any] = {
    "limits": {
        "max_body_bytes": 16 * MiB,
        "max_image_bytes": 8_000_000,
        "max_video_bytes": 12_000_000,
        "max_media_bytes": BODIES,
        "max_total_pixels": 400_000_000,
    },
    "cache": {
        "embedding_cache_bytes": EMBEDDINGS,
        "remembered_media_bytes": 8 * MiB,
        "kv_memory_bytes": KV,
    },
}


class Watch:
    """The resident memory of a server's processes together, looked at often."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.peak = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def now(self) -> int:
        total = 0
        for process in self._served.family():
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.05):
            self.peak = max(self.peak, self.now())


def ask(served: Served, sample: Sample, number: int) -> int:
    """The status; 0 for a client that does not wait for it, and for one that comes back too often."""
    body: dict[str, Any] = {}
    if sample.video is not None:
        body["media_io_kwargs"] = {"video": sample.video}
    part = sample.part | ({"uuid": f"u{number}"} if number % 7 == 0 else {})
    for _ in range(100):
        try:
            timeout_s = 0.3 if number % LEAVES == 0 else 300.0
            response = served.ask(part, text=f"What is {number}?", timeout_s=timeout_s, **body)
        except httpx.TransportError:
            assert number % LEAVES == 0
            return 0
        if response.status_code != 429:
            return response.status_code
        time.sleep(0.2)
    return 0


def flood(served: Served, samples: Samples, seed: int, requests: int) -> Counter[str]:
    """Send a mix; what was answered, by kind and status. Nothing may be answered in a way it should not."""
    rng = random.Random(seed)
    asked = [(samples.of(rng), seed * requests + number + 1) for number in range(requests)]
    with ThreadPoolExecutor(CLIENTS) as threads:
        statuses = list(threads.map(lambda one: ask(served, *one), asked))
    wrong = [
        (sample.name, status)
        for (sample, _), status in zip(asked, statuses, strict=True)
        if status not in (*sample.statuses, 0)
    ]
    assert wrong == []
    return Counter(f"{sample.name} {status}" for (sample, _), status in zip(asked, statuses, strict=True))


@pytest.mark.slow
def test_memory_stays_within_its_budget_through_500_requests(tmp_path: Path) -> None:
    """R9 to R18 together: the sum of all processes stays within start + budget + 10 %, and grows no more."""
    samples = Samples(tmp_path)
    with serving(tmp_path, SETTINGS) as served:
        flood(served, samples, 1, 2 * CLIENTS)  # every process and library is there
        served.settled(60)
        watch = Watch(served)
        start = watch.now()
        found = flood(served, samples, 2, REQUESTS // 2)
        served.settled(60)
        middle = watch.now()
        found += flood(served, samples, 3, REQUESTS // 2)
        counts = served.settled(60)
        end = watch.now()
        watch.close()
        told = served.counts()
    sizes = {"start": start, "middle": middle, "end": end, "peak": watch.peak, "budget": BUDGET}
    print({name: f"{size / MiB:.0f} MiB" for name, size in sizes.items()})  # noqa: T201
    print(dict(sorted(found.items())))  # noqa: T201
    print({name: count for name, count in counts.items() if count})  # noqa: T201
    assert watch.peak <= start + 1.1 * BUDGET
    assert end <= middle * 1.1
    assert told["held_bytes/media"] == told["held_bytes/bodies"] == 0
    assert told["held_bytes/remembered"] <= 8 * MiB
    assert counts["embedding_cache_bytes/memory"] <= EMBEDDINGS
    assert counts["encode_now/decoded_ahead_bytes"] == 0
    assert sum(count for name, count in found.items() if name.endswith(" 0")) <= REQUESTS // LEAVES + 5
