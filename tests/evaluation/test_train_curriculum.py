"""The curriculum's trainer: every kind of row, the tower along or not, and going on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmserve.evaluation import train_curriculum
from mmserve.evaluation.clipworld import sample_scene
from mmserve.evaluation.curriculum import Lesson
from mmserve.evaluation.tiny_model import DRAFT, build_config, build_model, build_tokenizer
from mmserve.evaluation.tiny_pools import Item, Supply
from mmserve.evaluation.train_curriculum import PRUNERS, Curriculum, any_pruner, still
from mmserve.evaluation.train_phases import Phase
from mmserve.evaluation.train_steps import schedule

TOKENIZER = build_tokenizer()
FROZEN = Phase(
    name="frozen",
    steps=2,
    peak=1e-3,
    menu={"clip": 1, "still": 1, "varied": 0.5, "stream": 0, "mixed": 1},
    carriers={"clip": 0.5, "still": 1.0},
    reduced={"clip": 0.5, "mixed": 0.5},
    supplies={"clip": Supply(1, 1, 1)},
    longest_mix=3,
)


class NoWorkers:
    """Stands in for the pools: a few items, made in this process."""

    def __init__(self, *_: object) -> None:
        pass

    def advance(self, step: int) -> None:
        self.step = step

    def draw(self, lesson: Lesson, rng: np.random.Generator) -> Item:
        frames = 1 if lesson == "image" else 3
        scene = sample_scene(np.random.default_rng(int(rng.integers(4))), "colour", frames)
        tokens = torch.from_numpy(rng.standard_normal((frames, 36, 128), np.float32)).bfloat16()
        if lesson == "image":
            tokens = torch.zeros(144, 128, dtype=torch.bfloat16)
        return Item(scene, tokens.view(torch.int16), torch.rand(tokens.shape[:-1]))

    def close(self) -> None:
        pass


def curriculum(run: Path) -> Curriculum:
    run.mkdir()
    return Curriculum(build_model(build_config(TOKENIZER, DRAFT), 0), TOKENIZER, run, 0, 1)


def test_training_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_curriculum, "Pools", NoWorkers)
    straight = curriculum(tmp_path / "straight")
    straight.train(FROZEN)
    # the rate is planned for all steps, so the first step alone must have the same plan
    monkeypatch.setattr(train_curriculum, "schedule", lambda step, *_, **__: schedule(step, 2, 1.0, 40))
    stopped = curriculum(tmp_path / "stopped")
    stopped.train(replace(FROZEN, steps=1))
    again = Curriculum(build_model(stopped.model.config, 1), TOKENIZER, tmp_path / "stopped", 0, 1)
    again.train(FROZEN)
    for (name, one), (_, other) in zip(
        straight.whole.named_parameters(), again.whole.named_parameters(), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6), name


def test_the_tower_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_curriculum, "Pools", NoWorkers)
    trained = curriculum(tmp_path / "run")
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    trained.train(replace(FROZEN, steps=1))
    changed = {
        name for name, value in trained.model.state_dict().items() if not torch.equal(before[name], value)
    }
    assert changed
    assert not any("vision_tower" in name or "projector" in name for name in changed)


def test_the_log_holds_losses_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_curriculum, "Pools", NoWorkers)
    trained = curriculum(tmp_path / "run")
    trained.train(replace(FROZEN, steps=20, menu={"still": 1}))
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["step"] == 20
    assert row["still+"] > 0


def test_rows_of_every_kind_may_lose_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_curriculum, "Pools", NoWorkers)
    trained = curriculum(tmp_path / "run")
    menu = {"clip": 1, "varied": 0.5, "long": 0.5, "mixed": 0.5}
    trained.train(replace(FROZEN, steps=20, menu=menu, carriers={}, reduced=dict.fromkeys(menu, 1.0)))
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert {f"{kind}-" for kind in menu} <= json.loads(line).keys()


def test_every_method_takes_its_turn() -> None:
    rng = np.random.default_rng(0)
    drawn = [any_pruner(rng) for _ in range(100)]
    assert {pruner.name for pruner in drawn} == set(PRUNERS)
    assert {pruner.keep for pruner in drawn} <= {0.1, 0.15, 0.25, 0.5}
    assert any_pruner(np.random.default_rng(1)) == any_pruner(np.random.default_rng(1))


def test_a_still_is_one_frame_of_a_clip() -> None:
    pools = NoWorkers()
    item = pools.draw("clip", np.random.default_rng(0))
    one = still(np.random.default_rng(0), item)
    assert one.scene.frames == len(one.content) == 1
    assert one.saliency.shape == (1, 36)


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    rates = [schedule(step, 100, 1.0, 10, floor=0.4) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.4)
