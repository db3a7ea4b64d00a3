"""Real pipelines on the embedded model, started once for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mmserve.evaluation.suites import Example, examples, write_suite
from mmserve.llm import LLM

Conversation = list[dict[str, Any]]


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(threads=1) as running:
        yield running


@pytest.fixture(scope="session")
def epd() -> Iterator[LLM]:
    with LLM(epd=(1, 1, 1), threads=1) as running:
        yield running


@pytest.fixture(scope="session")
def basic_clips(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Example]]:
    """The first 40 questions of clipworld-basic with their mp4 files."""
    folder = tmp_path_factory.mktemp("basic")
    write_suite("clipworld-basic", folder, 40, seed=5)
    return [
        (folder / f"{example.example_id}.mp4", example)
        for example in islice(examples("clipworld-basic", 5), 40)
    ]


def ask(clip: Path, question: str) -> Conversation:
    return [
        {
            "role": "user",
            "content": [{"type": "video", "video": str(clip)}, {"type": "text", "text": question}],
        }
    ]
