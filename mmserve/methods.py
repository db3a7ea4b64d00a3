"""The names of the registered methods, for parts that hold no torch: the API process, the demo, the CLI.

The registries beside the methods themselves are the truth; a test keeps the two equal. Knows nothing
about what a method does.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from mmserve.config import MethodDefaults
from mmserve.errors import BadRequest
from mmserve.request import Methods

Kind = Literal["prune", "attention", "kv", "kv_dtype"]

NAMES: dict[Kind, tuple[str, ...]] = {
    "prune": ("none", "random", "uniform", "holitom"),
    "attention": ("dense",),
    "kv": ("none", "random", "snapkv"),
    "kv_dtype": ("auto",),
}


class MethodOptions(TypedDict, total=False):
    """The fields of `Methods` as keyword arguments; what is left out or None is the deployment's."""

    prune: str | None
    keep: float | None
    attention: str | None
    kv: str | None
    kv_budget: float | None
    kv_dtype: str | None


def choose_methods(
    defaults: MethodDefaults,
    *,
    prune: str | None = None,
    keep: float | None = None,
    attention: str | None = None,
    kv: str | None = None,
    kv_budget: float | None = None,
    kv_dtype: str | None = None,
) -> Methods:
    """What a request asks for over what the deployment does by default; raises BadRequest."""
    methods = Methods(
        prune=_known("prune", defaults.prune if prune is None else prune),
        keep=defaults.keep if keep is None else keep,
        attention=_known("attention", defaults.attention if attention is None else attention),
        kv=_known("kv", defaults.kv if kv is None else kv),
        kv_budget=defaults.kv_budget if kv_budget is None else kv_budget,
        kv_dtype=_known("kv_dtype", defaults.kv_dtype if kv_dtype is None else kv_dtype),
    )
    if not 0 < methods.keep <= 1:
        raise BadRequest(f"Expected keep of above 0, at most 1, but got {methods.keep:g}")
    if methods.kv_budget is not None and not 0 < methods.kv_budget < 2**31:
        raise BadRequest(f"Expected kv_budget of more than 0, but got {methods.kv_budget:g}")
    return methods


def _known(kind: Kind, name: str) -> str:
    if name not in NAMES[kind]:
        raise BadRequest(f"Expected {kind} to be one of {', '.join(NAMES[kind])}, but got {name[:40]!r}")
    return name
