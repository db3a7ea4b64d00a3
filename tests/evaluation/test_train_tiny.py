"""The recipe as one command: every phase in order, scored, and a checkpoint at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.evaluation import train_tiny
from mmserve.evaluation.tiny_model import DRAFT, build_config, build_model, build_tokenizer
from mmserve.evaluation.train_curriculum import Curriculum
from mmserve.evaluation.train_phases import DRAFT_PHASES, LANGUAGE, TINY_PHASES, Phase


def test_phases_have_names_of_their_own_and_items_for_their_rows() -> None:
    for phases in (TINY_PHASES, DRAFT_PHASES):
        assert len({phase.name for phase in phases}) == len(phases)
        for phase in phases:
            needed = {"clip" if kind == "still" else kind for kind in phase.menu} - {"mixed"}
            needed |= {"clip", "image"} if "mixed" in phase.menu else set()
            assert needed == set(phase.supplies)
            assert set(phase.carriers) <= set(phase.menu)


def test_a_run_goes_through_its_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(train_tiny, "train_tower", lambda *_, **__: order.append("tower"))
    monkeypatch.setattr(train_tiny, "accuracies", lambda *_, **__: {"clipworld-basic": 0.5})

    def train(_: Curriculum, phase: Phase) -> None:
        order.append(phase.name)

    monkeypatch.setattr(Curriculum, "train", train)
    phases = (LANGUAGE, replace(LANGUAGE, name="more"))
    for _ in range(2):  # the second time finds the tower trained
        train_tiny.train(tmp_path, DRAFT, phases, seed=0, tower_steps=1, workers=1)
    assert order == ["tower", "language", "more", "language", "more"]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["phase"] == "language"
    assert rows[0]["clipworld-basic"] == 0.5
    made = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert sum(parameter.numel() for parameter in made.parameters()) < 1.5e6


def test_no_two_heads_start_equal() -> None:
    model = build_model(build_config(build_tokenizer(), DRAFT), 0)
    for layer in model.model.language_model.layers:
        heads = layer.self_attn.q_proj.weight.detach().unflatten(0, (4, -1))
        distances = torch.cdist(heads.flatten(1), heads.flatten(1))
        assert float(distances[~torch.eye(4, dtype=torch.bool)].min()) > 0.1
