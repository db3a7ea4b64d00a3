"""The embedded model as it is shipped: size, layout, and what it must know."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.batch.score import is_correct
from mmserve.evaluation.suites import write_suite
from mmserve.llm import LLM
from mmserve.models.resolve import resolve
from mmserve.sampling import SamplingParams

from .conftest import ask

CLIPS = Path(__file__).parents[2] / "demo" / "clips"
GATE = 46  # of 48


def test_the_checkpoint_is_small_and_transformers_loads_it_as_it_is() -> None:
    path = resolve("tiny")
    assert sum(file.stat().st_size for file in path.iterdir()) <= 15_000_000
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype="auto")
    assert model.dtype == torch.bfloat16
    with safe_open(path / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert (path / "README.md").is_file()


def test_the_bundled_clips_are_the_first_questions_of_the_suite(tmp_path: Path) -> None:
    made = write_suite("clipworld-basic", tmp_path, 48, seed=0)
    assert made.read_text() == (CLIPS / "questions.jsonl").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in CLIPS.iterdir()}


def test_the_bundled_questions_are_answered(llm: LLM) -> None:
    rows = [json.loads(line) for line in (CLIPS / "questions.jsonl").read_text().splitlines()]
    outputs = llm.chat(
        [ask(CLIPS / row["video"], row["question"]) for row in rows], SamplingParams(max_tokens=8)
    )
    right = [
        is_correct(output.outputs[0].text, row["answer"]) for row, output in zip(rows, outputs, strict=True)
    ]
    assert sum(right) >= GATE
