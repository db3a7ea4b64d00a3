"""Sections of a configuration: frozen dataclasses whose fields are checked by their annotations.

Knows nothing about which settings there are.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mmserve.budget import Budget, checked_keep
from mmserve.errors import BadRequest, ConfigError

_T = TypeVar("_T")


def settle(section: object, path: str, root: type[object]) -> None:
    """Check and convert every field by its annotation, however the section was constructed."""
    for name, hint in get_type_hints(type(section)).items():
        # the instance is frozen for everybody else
        object.__setattr__(section, name, _value(hint, getattr(section, name), _join(path, name), root))


def section_of(cls: type[_T], given: object, path: str, root: type[object]) -> _T:
    """A dataclass out of a mapping; for a setting that is unknown, the nearest one of `root` is named."""
    if not isinstance(given, Mapping):
        raise _mismatch(path or "the configuration", "a mapping of settings", given)
    known = get_type_hints(cls)
    for key in given:
        if key not in known:
            raise ConfigError(
                f"Expected a known setting, but got {_join(path, key)!r}; {_nearest(str(key), path, root)}"
            )
    return cls(**given)


def _value(hint: Any, given: object, path: str, root: type[object]) -> object:  # noqa: ANN401  # a hint has no common type
    """`given` as the annotated type; lists become tuples and strings paths, nothing else changes."""
    if is_dataclass(hint):
        kind = cast("type", hint)
        return given if isinstance(given, kind) else section_of(kind, given, path, root)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = tuple(arg for arg in args if arg is not type(None))
        if given is None:
            return None
        return _value(inner[0], given, path, root) if len(inner) == 1 else _budget(given, path)
    if origin is Literal:
        if given not in args:
            raise _mismatch(path, f"one of {', '.join(args)}", given)
        return given
    if origin is tuple:
        return _tuple(args, given, path, root)
    if origin is dict:
        if not isinstance(given, Mapping):
            raise _mismatch(path, "a mapping of settings", given)
        kind, inner = args
        # JSON's names are text
        names = [int(name) if kind is int and str(name).isdecimal() else name for name in given]
        checked = (_value(inner, item, path, root) for item in given.values())
        known = (_value(kind, name, f"a name in {path}", root) for name in names)
        return dict(zip(known, checked, strict=True))
    if hint is Any:
        return given
    if hint is Path and isinstance(given, str):
        return Path(given)
    if hint is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    # bool is an int in Python, but "port: yes" is a mistake
    if not isinstance(given, hint) or (hint is int and isinstance(given, bool)):
        raise _mismatch(path, _NAMES[hint], given)
    return given


def _budget(given: object, path: str) -> Budget:
    try:
        return checked_keep(given, path)
    except BadRequest as error:
        raise ConfigError(error.public_message) from error


def _tuple(args: tuple[Any, ...], given: object, path: str, root: type[object]) -> tuple[object, ...]:
    any_length = args[-1] is Ellipsis
    if any_length and isinstance(given, args[0]):
        given = [given]  # one key needs no list
    expected = f"a list of {_NAMES[args[0]]}" if any_length else f"a list of {len(args)} values"
    if not isinstance(given, list | tuple) or not (any_length or len(given) == len(args)):
        raise _mismatch(path, expected, given)
    hints = [args[0]] * len(given) if any_length else args
    return tuple(
        _value(hint, item, f"{path}[{i}]", root)
        for i, (hint, item) in enumerate(zip(hints, given, strict=True))
    )


_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def _mismatch(path: str, expected: str, given: object) -> ConfigError:
    # the value itself may be a secret
    found = "nothing" if given is None else type(given).__name__
    if isinstance(given, str | int | float) and not path.startswith("api_key"):
        found += f" {given!r}"
    return ConfigError(f"Expected {path} to be {expected}, but got {found}")


def _nearest(key: str, path: str, root: type[object]) -> str:
    names = list(_names(root, ""))
    here = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == path}
    anywhere = {name.rpartition(".")[2]: name for name in names}
    for candidates, cutoff in ((here, 0.6), (anywhere, 0.6), (here, 0.0)):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff):
            return f"the nearest is {candidates[close[0]]!r}"
    raise AssertionError("every section has settings")


def _names(cls: type[object], path: str) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield _join(path, name)
        if is_dataclass(hint):
            yield from _names(cast("type[object]", hint), _join(path, name))


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def plain(value: object) -> object:
    """Sections, tuples and paths as a file has them."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
