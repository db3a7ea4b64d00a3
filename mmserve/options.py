"""Options that several commands share, and what becomes of them. Knows nothing about commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Unpack

import typer

from mmserve.errors import BadRequest

if TYPE_CHECKING:
    from mmserve.llm import LLM
    from mmserve.methods import OtherOptions
    from mmserve.request import MediaOptions, Methods, Option

T = TypeVar("T")

METHODS = "Methods"
FRAMES = "Frames and answer"

Model = Annotated[str, typer.Option(help="A Hugging Face directory or hub name.", metavar="M")]
Prune = Annotated[
    str, typer.Option(help="Drops or merges visual tokens.", metavar="NAME", rich_help_panel=METHODS)
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="What --prune keeps: up to 1 a share of the visual tokens, above 1 tokens of each item, "
        "16/frame so many per frame; 0.25 by default.",
        metavar="N_OR_RATIO",
        rich_help_panel=METHODS,
    ),
]
KeepImage = Annotated[
    str | None,
    typer.Option(
        help="The same for images, where that differs.", metavar="N_OR_RATIO", rich_help_panel=METHODS
    ),
]
PruneOptions = Annotated[
    str | None,
    typer.Option(
        help='Other settings of --prune, by the names that `mmserve methods` lists: {"tau": 0.7}.',
        metavar="JSON",
        rich_help_panel=METHODS,
    ),
]
PruneTextImages = Annotated[
    bool,
    typer.Option(
        "--prune-text-images",
        help="Reduce also images that look like pages of text.",
        rich_help_panel=METHODS,
    ),
]
Attention = Annotated[
    str, typer.Option(help="How the prompt attends to itself.", metavar="NAME", rich_help_panel=METHODS)
]
AttentionOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--attention-option",
        help="A setting of --attention, by the names that `mmserve methods` lists, such as sink=64; "
        "may repeat.",
        metavar="NAME=VALUE",
        rich_help_panel=METHODS,
    ),
]
AttentionDenseBelow = Annotated[
    int | None,
    typer.Option(
        help="Prompts attend densely until they have so many tokens; by default until it costs time.",
        min=0,
        metavar="TOKENS",
        rich_help_panel=METHODS,
    ),
]
AttentionProfile = Annotated[
    str | None,
    typer.Option(
        help="What `mmserve profile-attention` has written, for --attention mminference.",
        metavar="F.json",
        rich_help_panel=METHODS,
    ),
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
KVOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-option",
        help="Another setting of --kv, as `mmserve methods` lists them, such as window=32; may repeat.",
        metavar="NAME=VALUE",
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


def methods_of(
    *,
    keep: str | None = None,
    keep_image: str | None = None,
    prune_options: str | None = None,
    attention_options: Sequence[str] | None = None,
    kv_options: Sequence[str] | None = None,
    **given: Unpack[OtherOptions],
) -> Methods:
    """The methods that options name; a wrong name or number is wrong usage."""
    from mmserve.budget import read_keep
    from mmserve.config import MethodDefaults
    from mmserve.methods import choose_methods

    methods = usage(
        lambda: choose_methods(
            MethodDefaults(),
            keep=None if keep is None else read_keep(keep),
            keep_image=None if keep_image is None else read_keep(keep_image, "keep_image"),
            prune_options=read_options(prune_options),
            attention_options=read_settings("--attention-option", attention_options),
            kv_options=read_settings("--kv-option", kv_options),
            **given,
        )
    )
    check_options(methods)
    return methods


def check_options(methods: Methods) -> None:
    """Settings that a method does not have are wrong usage; only where there are any is it loaded."""
    if methods.has_settings:
        from mmserve.catalogue import check_methods

        usage(lambda: check_methods(methods))


def read_options(text: str | None) -> dict[str, Any]:
    """The value of --prune-options; raises BadRequest."""
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise BadRequest("Expected --prune-options as JSON, but it does not parse") from error
    if not isinstance(given, dict):
        raise BadRequest('Expected --prune-options as an object such as {"tau": 0.7}, but got something else')
    return given


def read_settings(option: str, given: Sequence[str] | None) -> dict[str, Option]:
    """The values of a repeated NAME=VALUE option: JSON where they are, else text; raises BadRequest."""
    settings: dict[str, Option] = {}
    for pair in given or ():
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise BadRequest(f"Expected {option} as NAME=VALUE, but got {pair[:40]!r}")
        try:
            settings[name] = json.loads(text)
        except (ValueError, RecursionError):
            settings[name] = text
    return settings


def media_options_of(num_frames: int | None, fps: float | None, media_io: str | None = None) -> MediaOptions:
    from mmserve.media.options import media_options

    if num_frames is not None and fps is not None:
        raise typer.BadParameter("Expected either --num-frames or --fps, but got both")
    if fps is not None and not 0 < fps <= 1000:
        raise typer.BadParameter(f"Expected --fps above 0 and at most 1000, but got {fps:g}")
    try:
        given = json.loads(media_io or "{}")
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter("Expected --media-io-kwargs as JSON, but it does not parse") from error
    sampled = usage(lambda: media_options(given))
    # the options of the same name win
    return media_options({"video": {"num_frames": num_frames, "fps": fps}}, sampled)


def open_llm(model: str, methods: Methods, options: MediaOptions, epd: tuple[int, int, int] | None) -> LLM:
    import msgspec

    from mmserve.llm import LLM
    from mmserve.media.options import media_io_kwargs

    settings: dict[str, Any] = msgspec.to_builtins(methods)
    return LLM(model, epd=epd, media_io_kwargs=media_io_kwargs(options), **settings)
