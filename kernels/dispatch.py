"""Which implementation of an operation serves a device. Knows nothing about the operations."""

from __future__ import annotations

import os
import sys
from typing import Literal, cast, get_args

import torch

Backend = Literal["naive", "triton", "interpret"]
VARIABLE = "MMSERVE_KERNELS"
CHOICES = ("auto", *get_args(Backend))


def backend_for(device: torch.device) -> Backend:
    """What MMSERVE_KERNELS chooses; `auto`, its default, is Triton on CUDA and the oracle elsewhere.

    `interpret` runs the Triton kernels on the CPU, slowly. Triton decides that as it is imported, so this
    sets its environment variable and refuses when it comes too late.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"Expected {VARIABLE} to be one of {', '.join(CHOICES)}, but got {choice!r}")
    if choice == "auto":
        return "triton" if device.type == "cuda" else "naive"
    if choice == "triton" and device.type != "cuda":
        raise ValueError(f"Expected a CUDA device for {VARIABLE}=triton, but got {device}")
    if choice == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise RuntimeError(f"{VARIABLE}=interpret has to be set before triton is imported")
        os.environ["TRITON_INTERPRET"] = "1"
    return cast(Backend, choice)
