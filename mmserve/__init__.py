"""Vision-language models served in three stages: encode, prefill, decode.

The names below are loaded on first use, so that a process which needs no model imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmserve.config import ServeConfig
    from mmserve.llm import LLM, AsyncLLM
    from mmserve.request import CompletionOutput, RequestOutput
    from mmserve.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "ServeConfig"]

_HOMES = {
    "LLM": "mmserve.llm",
    "AsyncLLM": "mmserve.llm",
    "CompletionOutput": "mmserve.request",
    "RequestOutput": "mmserve.request",
    "SamplingParams": "mmserve.sampling",
    "ServeConfig": "mmserve.config",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
