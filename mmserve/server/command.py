"""The command `mmserve serve`: from its options to a configuration. Heavy imports wait until it runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MEMORY = "Memory and batches"


def serve(
    model: Annotated[str | None, typer.Argument(help="Default: tiny, or what the file says.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML; options given here win.", metavar="F.yaml", exists=True),
    ] = None,
    epd: Annotated[
        str | None, typer.Option(help="Encode, prefill and decode workers; 1,1,1 by default.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 by default, 0 takes any.", min=0, max=65535)] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Asked of every client.", envvar="MMSERVE_API_KEY", show_envvar=True)
    ] = None,
    video_backend: Annotated[
        str | None,
        typer.Option(help="What decodes videos: pyav by default, decord, or torchcodec.", metavar="NAME"),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Also serve the demo page.")] = False,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="KV pages of each language worker, such as 4GiB; by default 1GiB on a CPU, and on a GPU "
            "what --gpu-memory-utilization leaves.",
            metavar="BYTES",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            help="Share of a GPU's memory that a language worker may fill; 0.9 by default.",
            metavar="R",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            help="Rows of one step of the language model; 512 on a CPU, 8192 on a GPU by default.",
            min=1,
            metavar="N",
            rich_help_panel=MEMORY,
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API."""
    from mmserve.config import ServeConfig, load_config

    resolved = load_config(config) if config else ServeConfig()
    cache = {
        "kv_memory_bytes": None if kv_memory is None else read_bytes(kv_memory),
        "gpu_memory_utilization": gpu_memory_utilization,
    }
    given = {
        "model": model,
        "epd": read_epd(epd),
        "host": host,
        "port": port,
        "api_key": None if api_key is None else (api_key,),
        "video_backend": video_backend,
        "max_num_batched_tokens": max_num_batched_tokens,
        "cache": replace(resolved.cache, **_given(cache)),
    }
    resolved = replace(resolved, **_given(given))
    from mmserve.server.serve import serve as run

    raise typer.Exit(run(resolved, demo=demo))


def read_epd(text: str | None) -> tuple[int, int, int] | None:
    """Numbers of workers out of "1,1,1"."""
    if text is None:
        return None
    counts = [int(part) for part in text.split(",") if part.isdecimal() and int(part)]
    if len(counts) != 3 or text.count(",") != 2:
        raise typer.BadParameter(f"Expected --epd as three counts such as 1,1,1, but got {text}")
    return counts[0], counts[1], counts[2]


def read_bytes(text: str) -> int:
    """Bytes out of "4GiB", "512m" or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"Expected a size such as 4GiB or 512MiB, but got {text}")
    return int(float(found[1]) * UNITS[found[2]])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
