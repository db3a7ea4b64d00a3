"""`mmserve profile-attention` on the embedded model and one small picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmserve.attention.backend import ATTENTION
from mmserve.attention.cpu import CpuAttention
from mmserve.attention.search import Recorded
from mmserve.cli import app
from mmserve.evaluation import profiling


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clips") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (144, 144, 3), np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def prompt(picture: Path) -> Recorded:
    (recorded,) = profiling.record("tiny", [picture], "What is it?", None)
    return recorded


def test_a_prompt_is_recorded_as_attention_saw_it(prompt: Recorded) -> None:
    slots = len(prompt.is_visual)
    assert 0 < prompt.is_visual.sum() < slots
    assert ((prompt.item >= 0) == prompt.is_visual).all()
    assert len(prompt.queries) == len(prompt.keys) == len(prompt.values) == 6
    assert {len(queries) for queries in prompt.queries} == {slots}
    assert {len(keys) for keys in (*prompt.keys, *prompt.values)} == {slots}
    assert not torch.equal(prompt.keys[0], prompt.keys[1])
    assert ATTENTION["cpu"] is CpuAttention


def test_inputs_tell_files_and_questions_apart(prompt: Recorded, picture: Path) -> None:
    inputs = profiling.inputs_of([picture], "What is it?", [prompt])
    assert (inputs.prompts, inputs.tokens) == (1, len(prompt.is_visual))
    assert inputs == profiling.inputs_of([picture], "What is it?", [prompt])
    assert inputs != profiling.inputs_of([picture], "What else?", [prompt])
    assert inputs != profiling.inputs_of([picture, picture], "What is it?", [prompt])


@pytest.mark.parametrize("arguments", [["--budget", "0", "-o", "p.json"], ["-o", "nowhere/p.json"], []])
def test_wrong_usage_ends_before_anything_runs(arguments: list[str], picture: Path) -> None:
    result = CliRunner().invoke(app, ["profile-attention", "tiny", str(picture), *arguments])
    assert result.exit_code != 0
