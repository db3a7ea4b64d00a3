"""What each head of a model does with a long prompt, as found offline, and the file it is kept in.

A profile is JSON with a version, the digest of the prompts it was found on, and for every head its lines
with the recall and the error that were measured. Knows nothing about how heads are searched or how lines
become an index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from mmserve.errors import BadRequest, ConfigError

VERSION = 1
MAX_BYTES = 64 << 20
Pattern = Literal["a_shape", "vertical_slash", "grid"]
Boundary = Literal["no", "k", "q", "2d"]
Stride = Literal["frame", "searched"]
LINES = ("vision", "text", "vision_to_text", "text_to_vision")  # of a head
PATTERNS, BOUNDARIES, STRIDES = get_args(Pattern), get_args(Boundary), get_args(Stride)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Which keys of one group some rows see: the first `sink` and the last `local` ones, and lines.

    vertical_slash: the `vertical` keys with most weight, and the `slash` diagonals. grid: the keys of one
    residue class (`vline`), rows of that class see everything (`hline`), keys of a row's own class (`same`),
    and `vertical` single keys beside them; the stride is that of frames, or whatever is found. Where there is
    no grid: `slash` diagonals, and `otherwise` single keys, or `vertical` if that is more.
    """

    pattern: Pattern = "a_shape"
    sink: int
    local: int  # at least 1: a row sees itself
    vertical: int = 0
    slash: int = 0
    otherwise: int = 0
    stride: Stride = "searched"
    vline: bool = False
    hline: bool = False
    same: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The lines of one head, and where they are cut.

    With boundary `no` all rows see all keys by `vision`, on the prompt as it lies. With `q` rows of vision do
    so by `vision` and rows of text by `text`. With `k` keys are gathered: all rows see those of vision by
    `vision` and those of text by `text`. With `2d` both: rows of vision see the keys of text by
    `vision_to_text`, rows of text those of vision by `text_to_vision`.
    """

    boundary: Boundary = "2d"
    vision: Lines
    text: Lines
    vision_to_text: Lines
    text_to_vision: Lines
    # measured over the prompts of the search: the weight of dense attention that is seen, the distance of
    # the output from dense attention's, relative, and what the head costs
    recall: float | None = None
    error: float | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The prompts of a search; the digest is SHA-256 over their files, names and questions."""

    digest: str
    prompts: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProfile:
    """Heads of every layer of one model."""

    model: str
    inputs: Inputs
    budget: float  # what a head may cost, of dense attention: candidates were brought to that
    costs: Literal["measured", "counted"]
    heads: tuple[tuple[Head, ...], ...]  # by layer

    def to_json(self) -> str:
        return json.dumps({"version": VERSION} | asdict(self), indent=1) + "\n"

    def check_model(self, layers: int, heads: int) -> None:
        """Raise BadRequest where the profile is another model's."""
        if len(self.heads) != layers or len(self.heads[0]) != heads:
            raise BadRequest(
                f"Expected an attention profile of {layers} layers with {heads} heads, "
                f"but got one of {len(self.heads)} with {len(self.heads[0]) if self.heads else 0}"
            )


def load_profile(path: str) -> AttentionProfile:
    """The profile in a file; raises ConfigError where there is none."""
    try:
        state = Path(path).stat()
        return _loaded(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise ConfigError(f"Expected an attention profile in {path}, but it cannot be read") from error


@lru_cache(maxsize=8)
def _loaded(path: str, changed_ns: int, size: int) -> AttentionProfile:
    """`changed_ns` and `size` tell a file that was written anew."""
    if size > MAX_BYTES:
        raise ConfigError(f"Expected an attention profile of at most {MAX_BYTES} bytes, but got {size}")
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"Expected an attention profile in {path}, but it is no JSON") from error
    return read_profile(content)


def read_profile(content: object) -> AttentionProfile:
    """A profile out of JSON; raises ConfigError where something of it is missing, unknown or wrong."""
    top = _object(content, "profile")
    if top.get("version") != VERSION:
        raise ConfigError(
            f"Expected an attention profile of version {VERSION}, but got {top.get('version')!r:.20}"
        )
    top = {name: value for name, value in top.items() if name != "version"}
    layers = _list(top.get("heads"), "heads")
    top["heads"] = tuple(tuple(_head(head) for head in _list(heads, "heads")) for heads in layers)
    top["inputs"] = _built(Inputs, top.get("inputs"), {"digest": str, "prompts": int, "tokens": int})
    kinds = {
        "model": str,
        "inputs": Inputs,
        "budget": float,
        "costs": ("measured", "counted"),
        "heads": tuple,
    }
    profile: AttentionProfile = _built(AttentionProfile, top, kinds)
    if len({len(heads) for heads in profile.heads}) > 1:
        raise ConfigError("Expected an attention profile with as many heads in every layer")
    return profile


def _head(content: object) -> Head:
    given = dict(_object(content, "head"))
    for name in LINES:
        given[name] = _lines(given.get(name))
    kinds: dict[str, Any] = dict.fromkeys(LINES, Lines) | dict.fromkeys(
        ("recall", "error", "cost"), (float, None)
    )
    head: Head = _built(Head, given, {"boundary": BOUNDARIES, **kinds})
    return head


def _lines(content: object) -> Lines:
    kinds: dict[str, Any] = dict.fromkeys(("sink", "local", "vertical", "slash", "otherwise"), int)
    kinds |= dict.fromkeys(("vline", "hline", "same"), bool)
    lines: Lines = _built(Lines, content, {"pattern": PATTERNS, "stride": STRIDES, **kinds})
    if min(lines.sink, lines.vertical, lines.slash, lines.otherwise) < 0 or lines.local < 1:
        raise ConfigError(f"Expected sizes of 0 and more, and a local of 1 and more, but got {lines}")
    return lines


def _built(kind: Any, content: object, kinds: Mapping[str, Any]) -> Any:  # noqa: ANN401  # any dataclass
    """One of the dataclasses above out of an object whose fields are of these types, or of these values."""
    given = _object(content, kind.__name__)
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"Expected no {unknown[0]:.40} in a {kind.__name__} of an attention profile")
    for name, value in given.items():
        expected = kinds[name]
        if isinstance(expected, tuple):
            fits = value in expected or (float in expected and type(value) in (int, float))
        else:
            fits = type(value) in ((int, float) if expected is float else (expected,))
        if not fits:
            raise ConfigError(f"Expected another {name} in an attention profile, but got {value!r:.40}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"Expected every field of a {kind.__name__} in an attention profile") from error


def _object(content: object, what: str) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"Expected an object as {what} of an attention profile, but got {content!r:.40}")
    return content


def _list(content: object, what: str) -> list[object]:
    if not isinstance(content, list):
        raise ConfigError(f"Expected a list as {what} of an attention profile, but got {content!r:.40}")
    return content
