"""Which implementation serves a device."""

from __future__ import annotations

import pytest
import torch

from mmserve.kernels.dispatch import backend_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        (None, CPU, "naive"),
        (None, CUDA, "triton"),
        ("auto", CPU, "naive"),
        ("naive", CUDA, "naive"),
        ("triton", CUDA, "triton"),
        ("interpret", CPU, "interpret"),
    ],
)
def test_the_device_or_the_environment_chooses(
    monkeypatch: pytest.MonkeyPatch, choice: str | None, device: torch.device, expected: str
) -> None:
    if choice is None:
        monkeypatch.delenv("MMSERVE_KERNELS", raising=False)
    else:
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
    assert backend_for(device) == expected


@pytest.mark.parametrize("choice", ["triton", "fast"])
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setenv("MMSERVE_KERNELS", choice)
    with pytest.raises(ValueError, match="Expected"):
        backend_for(CPU)


def test_the_interpreter_cannot_come_after_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton  # noqa: F401

    monkeypatch.setenv("MMSERVE_KERNELS", "interpret")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="before triton"):
        backend_for(CPU)
