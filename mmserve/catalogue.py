"""What the registered methods declare about themselves: one view of all registries.

Knows nothing about what a method does; `methods` knows their names without importing any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmserve.budget import share_of
from mmserve.kv.base import POLICIES, load_policy
from mmserve.methods import NAMES, inner_part, outer_part
from mmserve.pruning.base import PRUNERS, load_pruner, make_pruner
from mmserve.pruning.inner import REDUCERS, load_reducer, make_reducer
from mmserve.request import Methods

# model families every encoder-side or cache-side method works with
FAMILIES = ("llava_onevision",)

Json = dict[str, Any]


def describe() -> list[Json]:
    """Every method as `mmserve methods --json` lists it."""
    rows = [_entry("prune", name, load_pruner(name)) for name in PRUNERS]
    rows += [_entry("prune", name, load_reducer(name)) for name in REDUCERS]
    rows += [_fixed("attention", name, "prefill") for name in NAMES["attention"]]
    rows += [_entry("kv", name, load_policy(name)) for name in POLICIES]
    return rows + [_fixed("kv_dtype", name, "prefill_end") for name in NAMES["kv_dtype"]]


def check_methods(methods: Methods) -> None:
    """Raise BadRequest unless the methods take their settings."""
    outer, inner = outer_part(methods), inner_part(methods)
    make_pruner(outer.name, share_of(outer.keep or 1.0, 1, 1), **outer.options)
    if inner is not None:
        make_reducer(inner.name, inner.keep, **inner.options)


def render(entries: Sequence[Json]) -> str:
    """The entries as text for a terminal, the first of each kind being its default."""
    lines = []
    for entry in entries:
        settings = ", ".join(f"{name} {value}" for name, value in entry["defaults"].items())
        needs = {
            "looks at the question": entry["needs_query"],
            "experimental on models that were not trained for it": entry["trained_weights"],
        }
        noted = ", ".join(note for note, is_so in needs.items() if is_so)
        cells = (entry["kind"], entry["name"], entry["acts_at"], noted, settings, entry["paper"])
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
