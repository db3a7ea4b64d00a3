"""The settings of a method: dataclass fields with a default, what is allowed, and a word about each.

Knows nothing about methods. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mmserve.pruning.base import check_count, check_flag, check_range

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Number = TypeVar("Number", bound=float | None)
Whole = TypeVar("Whole", bound=int | None)
Check = Callable[[str, object], None]  # of a setting's name and value


def setting(default: T, explanation: str, check: Check | None = None) -> T:
    """A field of a method; where the default is None, None is always allowed."""
    return dataclasses.field(default=default, metadata={"explanation": explanation, "check": check})


def number(default: Number, low: float, high: float, explanation: str, *, low_open: bool = False) -> Number:
    """From `low`, excluded if `low_open`, to `high`."""
    return setting(default, explanation, partial(check_range, low=low, high=high, low_open=low_open))


def whole(default: Whole, low: int, high: int, explanation: str) -> Whole:
    return setting(default, explanation, partial(check_count, low=low, high=high))


def flag(default: bool, explanation: str) -> bool:
    return setting(default, explanation, check_flag)


def share_kept(default: float) -> float:
    """The field `keep`."""
    return number(default, 0, 1, "the share of the visual tokens that is kept", low_open=True)


def check_values(method: DataclassInstance) -> None:
    """Raise BadRequest unless every setting is what it may be."""
    for field in dataclasses.fields(method):
        check, value = field.metadata.get("check"), getattr(method, field.name)
        if check is not None and not (value is None and field.default is None):
            check(field.name, value)


def explanations(method: type[DataclassInstance]) -> dict[str, str]:
    """A word about each setting that has one, by name."""
    fields = dataclasses.fields(method)
    return {field.name: text for field in fields if (text := field.metadata.get("explanation"))}
