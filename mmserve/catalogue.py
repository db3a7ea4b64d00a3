"""What the registered methods declare about themselves: one view of all registries.

Knows nothing about what a method does; `methods` knows their names without importing any.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mmserve.attention.base import PATTERNS, load_pattern, make_pattern
from mmserve.budget import share_of
from mmserve.errors import BadRequest
from mmserve.kv.base import POLICIES, load_policy, make_policy
from mmserve.methods import NAMES, inner_part, outer_part
from mmserve.pruning.base import PRUNERS, load_pruner, make_pruner
from mmserve.pruning.inner import REDUCERS, load_reducer, make_reducer
from mmserve.pruning.settings import explanations
from mmserve.request import Methods

# model families every encoder-side or cache-side method works with
FAMILIES = ("llava_onevision",)

Json = dict[str, Any]

HEAD = ("kind", "name", "acts at", "notes", "paper")
SETTINGS_HEAD = ("kind", "name", "setting", "default", "what it is")


def describe() -> list[Json]:
    """Every method as `mmserve methods --json` lists it."""
    rows = [_entry("prune", name, load_pruner(name)) for name in PRUNERS]
    rows += [_entry("prune", name, load_reducer(name)) for name in REDUCERS]
    rows += [_fixed("attention", "dense", "prefill")]
    rows += [_entry("attention", name, load_pattern(name)) for name in PATTERNS]
    rows += [_entry("kv", name, load_policy(name)) for name in POLICIES]
    return rows + [_fixed("kv_dtype", name, "prefill_end") for name in NAMES["kv_dtype"]]


def check_methods(methods: Methods, layers: int | None = None) -> None:
    """Raise BadRequest unless the methods take their settings, in a model of so many layers if known."""
    outer, inner = outer_part(methods), inner_part(methods)
    make_pruner(outer.name, share_of(outer.keep or 1.0, 1, 1), **outer.options)
    if inner is not None:
        reducer = make_reducer(inner.name, inner.keep, **inner.options)
        if layers is not None:
            reducer.layers(layers)
    if methods.attention != "dense":
        make_pattern(methods.attention, methods.attention_profile, **methods.attention_options)
    if methods.kv != "none":
        make_policy(methods.kv, **methods.kv_options)


def num_layers(model_dir: Path) -> int | None:
    """Those of the language model of a checkpoint; None where its configuration does not say."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["num_hidden_layers"])
    except (OSError, ValueError, LookupError):  # loading it will tell more
        return None


def render(entries: Sequence[Json]) -> str:
    """The entries as text for a terminal, the first of each kind being its default."""
    table, settings = [HEAD], [SETTINGS_HEAD]
    for entry in entries:
        needs = {
            "looks at the question": entry["needs_query"],
            "experimental on models that were not trained for it": entry["trained_weights"],
        }
        noted = ", ".join(note for note, is_so in needs.items() if is_so)
        table.append((entry["kind"], entry["name"], entry["acts_at"], noted, entry["paper"]))
        settings += [(entry["kind"], entry["name"], *row) for row in settings_of(entry)]
    return f"{_aligned(table)}\n\n{_aligned(settings)}"


def settings_of(entry: Json) -> list[tuple[str, str, str]]:
    """Name, default and a word about each setting of an entry."""
    words = entry["explanations"]
    return [
        (name, "none" if value is None else str(value), words.get(name, ""))
        for name, value in entry["defaults"].items()
    ]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    rows = [[cell or "-" for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
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
        "explanations": explanations(method),
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
        "explanations": {},
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


def main() -> None:
    """Check the methods on stdin in the model of a directory, for a process that holds no torch itself."""
    methods = msgspec.json.decode(sys.stdin.buffer.read(), type=Methods)
    try:
        check_methods(methods, num_layers(Path(sys.argv[1])))
    except BadRequest as error:
        sys.exit(error.public_message)


if __name__ == "__main__":
    main()
