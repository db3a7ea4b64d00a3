"""Which methods exist and what they declare about themselves: one view of all registries.

Knows nothing about what a method does. Imports torch only to describe methods, not to name most.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from mmserve.errors import BadRequest
from mmserve.pruning.base import PRUNERS, load_pruner
from mmserve.request import Methods

ATTENTION = ("dense",)
KV_DTYPES = ("auto",)
# model families every encoder-side or cache-side method works with
FAMILIES = ("llava_onevision",)

Json = dict[str, Any]


def names(kind: str) -> tuple[str, ...]:
    """Registered names of `prune`, `attention`, `kv` or `kv_dtype`, the default first."""
    if kind == "kv":
        from mmserve.kv.base import POLICIES

        return tuple(POLICIES)
    return {"prune": tuple(PRUNERS), "attention": ATTENTION, "kv_dtype": KV_DTYPES}[kind]


def check(methods: Methods) -> None:
    """Raise BadRequest for a name that is not registered or a value out of range."""
    defaults = Methods()
    for kind in ("prune", "attention", "kv", "kv_dtype"):
        name = getattr(methods, kind)
        # the default needs no look at the registry, which may need torch
        if name != getattr(defaults, kind) and name not in names(kind):
            close = difflib.get_close_matches(name, names(kind), n=1)
            hint = f"; the nearest is {close[0]}" if close else ""
            raise BadRequest(f"Expected {kind} to be one of {', '.join(names(kind))}, but got {name!r}{hint}")
    if not 0 < methods.keep <= 1:
        raise BadRequest(f"Expected keep above 0 and at most 1, but got {methods.keep:g}")
    if methods.kv_budget is not None and not 0 < methods.kv_budget < float("inf"):
        raise BadRequest(f"Expected kv_budget above 0, but got {methods.kv_budget:g}")


def describe() -> list[Json]:
    """Every method as `mmserve methods --json` lists it."""
    from mmserve.kv.base import POLICIES, load_policy

    rows = [_entry("prune", name, load_pruner(name)) for name in PRUNERS]
    rows += [_fixed("attention", name, "prefill") for name in ATTENTION]
    rows += [_entry("kv", name, load_policy(name)) for name in POLICIES]
    return rows + [_fixed("kv_dtype", name, "prefill_end") for name in KV_DTYPES]


def render(entries: Sequence[Json]) -> str:
    """The entries as text for a terminal, the first of each kind being its default."""
    lines = []
    for entry in entries:
        settings = ", ".join(f"{name} {value}" for name, value in entry["defaults"].items())
        query = "looks at the question" if entry["needs_query"] else ""
        cells = (entry["kind"], entry["name"], entry["acts_at"], query, settings, entry["paper"])
        lines.append([cell or "-" for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _entry(kind: str, name: str, method: Any) -> Json:  # noqa: ANN401  # a class or an instance of any registry
    return {
        "kind": kind,
        "name": name,
        "paper": method.paper,
        "acts_at": method.acts_at,
        "needs_query": method.needs_query,
        "needs_whole_item": method.needs_whole_item,
        "defaults": _defaults(method),
        "families": list(FAMILIES),
        "trained_weights": bool(getattr(method, "trained_weights", False)),
        "count": method.count,
    }


def _fixed(kind: str, name: str, acts_at: str) -> Json:
    return {
        "kind": kind,
        "name": name,
        "paper": "",
        "acts_at": acts_at,
        "needs_query": False,
        "needs_whole_item": False,
        "defaults": {},
        "families": list(FAMILIES),
        "trained_weights": False,
        "count": "exact",
    }


def _defaults(method: Any) -> Json:  # noqa: ANN401
    settings = {field.name: field.default for field in dataclasses.fields(method)}
    return {
        name: value
        for name, value in settings.items()
        if value is None or isinstance(value, int | float | str)
    }
