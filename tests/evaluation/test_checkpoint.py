"""Training state: what is saved comes back exactly, also with tied weights; no half files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmserve.evaluation import checkpoint
from mmserve.evaluation.checkpoint import load_state, save_state


class Tied(nn.Module):
    """An embedding that is also the output head, and a weight that is never trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.rand(3, 2).T)  # not contiguous
        self.unused = nn.Parameter(torch.rand(2))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(ids)) * self.scale.sum()
        return out


def optimiser_of(model: Tied) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [model.embedding.weight, model.unused]},
        {"params": [model.scale], "lr": 0.05},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def train(model: Tied, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        loss = model(torch.tensor([step % 7, 3])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    model = Tied(0)
    optimiser = optimiser_of(model)
    train(model, optimiser, 3)
    path = tmp_path / "state.safetensors"
    save_state(path, model, optimiser, 3)
    onwards = train(model, optimiser, 4)
    other = Tied(1)
    restored = optimiser_of(other)
    assert load_state(path, other, restored) == 3
    assert other.head.weight is other.embedding.weight
    assert train(other, restored, 4) == onwards
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # what has no gradient has no moments, before and after
    assert other.unused not in restored.state
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_model_alone_is_saved_and_loaded_without_an_optimiser(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    model, other = Tied(0), Tied(1)
    save_state(path, model, None, 12)
    fresh = optimiser_of(other)
    assert load_state(path, other, fresh) == 12
    assert torch.equal(model.scale, other.scale)
    assert not fresh.state
    assert load_state(path, Tied(2), None) == 12


def test_a_save_that_is_interrupted_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    model = Tied(0)
    save_state(path, model, None, 1)

    def half(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half of")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            save_state(path, model, None, 2)
    assert load_state(path, Tied(1), None) == 1
    save_state(path, model, None, 3)
    assert load_state(path, Tied(1), None) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
