"""Options that several commands share, and what becomes of them. Knows nothing about commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar, Unpack

import typer

from mmserve.errors import BadRequest

if TYPE_CHECKING:
    from mmserve.methods import MethodOptions
    from mmserve.request import Methods

T = TypeVar("T")

METHODS = "Methods"
FRAMES = "Frames and answer"

Model = Annotated[str, typer.Option(help="A Hugging Face directory or hub name.", metavar="M")]
Prune = Annotated[
    str, typer.Option(help="Drops or merges visual tokens.", metavar="NAME", rich_help_panel=METHODS)
]
Keep = Annotated[
    float, typer.Option(help="Share of visual tokens --prune keeps.", metavar="R", rich_help_panel=METHODS)
]
Attention = Annotated[
    str, typer.Option(help="How the prompt attends to itself.", metavar="NAME", rich_help_panel=METHODS)
]
KV = Annotated[
    str, typer.Option("--kv", help="Drops slots of the KV cache.", metavar="NAME", rich_help_panel=METHODS)
]
KVBudget = Annotated[
    float | None,
    typer.Option(
        help="What --kv keeps: up to 1 a share of the visual slots, above 1 slots per head; 0.25 by default.",
        metavar="N_OR_RATIO",
        rich_help_panel=METHODS,
    ),
]
KVDtype = Annotated[
    str, typer.Option(help="How the KV cache is stored.", metavar="NAME", rich_help_panel=METHODS)
]
NumFrames = Annotated[
    int | None,
    typer.Option(help="Sample N frames, evenly spread.", min=1, metavar="N", rich_help_panel=FRAMES),
]
Fps = Annotated[
    float | None,
    typer.Option(help="Sample F frames per second instead.", metavar="F", rich_help_panel=FRAMES),
]
MediaIo = Annotated[
    str | None,
    typer.Option(
        help='More about sampling, as in vLLM: {"video": {"start": 5, "end": 9, "max_pixels": 100000}}.',
        metavar="JSON",
        rich_help_panel=FRAMES,
    ),
]
MaxTokens = Annotated[
    int, typer.Option(help="Longest answer.", min=1, max=65536, metavar="TOKENS", rich_help_panel=FRAMES)
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="The server's key.", envvar="MMSERVE_API_KEY", metavar="K", show_envvar=True),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def usage(check: Callable[[], T]) -> T:
    """What `check` returns; what it finds wrong is wrong usage."""
    try:
        return check()
    except BadRequest as error:
        raise typer.BadParameter(error.public_message) from error


def methods_of(**given: Unpack[MethodOptions]) -> Methods:
    """The methods that options name; a wrong name or number is wrong usage."""
    from mmserve.config import MethodDefaults
    from mmserve.methods import choose_methods

    return usage(lambda: choose_methods(MethodDefaults(), **given))
