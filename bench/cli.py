"""The commands of `mmserve bench`. Each imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmserve.errors import BadRequest

app = typer.Typer(no_args_is_help=True, help="Measure speed, beside a peer on the same weights.")


@app.command()
def engine(
    vs: Annotated[
        str | None,
        typer.Option(help="The peer: transformers. Without one, only mmserve is measured.", metavar="PEER"),
    ] = None,
    geometry: Annotated[
        str,
        typer.Option(
            help="The model's sizes, with random weights: ov-mini, ov-0.5b, ov-7b, or nano for a quick try.",
            metavar="NAME",
        ),
    ] = "ov-mini",
    metrics: Annotated[
        str,
        typer.Option(
            help="What to measure: a comma list of ttft, second, batch, shared, decode, memory; or all.",
            metavar="NAME[,NAME]",
        ),
    ] = "all",
    rounds: Annotated[int, typer.Option(help="Paired runs of every metric.", min=1, metavar="N")] = 5,
    frames: Annotated[int, typer.Option(help="Frames of every video.", min=1, metavar="N")] = 32,
    tokens: Annotated[
        int, typer.Option(help="Tokens generated per request of a batch.", min=1, max=4096, metavar="N")
    ] = 16,
    peer_sample: Annotated[
        int,
        typer.Option(
            help="Requests of a batch that the peer answers one by one; its rate is that of these.",
            min=1,
            metavar="N",
        ),
    ] = 4,
    threads: Annotated[
        int | None, typer.Option(help="Threads of either side; by default all cores.", min=1, metavar="N")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Another seed, other weights and videos.", min=0, metavar="N")
    ] = 0,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where checkpoints are kept; by default the user's cache.", file_okay=False),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - prints it.", metavar="OUT")
    ] = None,
) -> None:
    """Measure the engine: first token, second question, batches, shared videos, decode, memory.

    Both sides run the same checkpoint and requests, each in a process of its own, in turn: A B A B. They
    must give the same numbers before anything is timed. A ratio above 1 is a win over the peer; it is
    the median over the rounds. The table and progress go to stderr.
    """
    from mmserve.bench import engine as bench

    try:
        plan = bench.Plan(
            geometry=geometry,
            vs=vs,
            metrics=None if metrics == "all" else tuple(dict.fromkeys(metrics.split(","))),
            rounds=rounds,
            frames=frames,
            tokens=tokens,
            peer_sample=peer_sample,
            threads=threads,
            seed=seed,
            cache_dir=cache_dir,
        )
    except BadRequest as error:
        raise typer.BadParameter(error.public_message) from error
    bench.command(plan, json_out)


@app.command()
def media(
    rounds: Annotated[int, typer.Option(help="Paired runs of every cell.", min=1, metavar="N")] = 7,
    backends: Annotated[
        str,
        typer.Option(
            help="What decodes videos: a comma list of pyav, decord, torchcodec.", metavar="NAME[,NAME]"
        ),
    ] = "installed",
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where videos are kept; by default the user's cache.", file_okay=False),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - prints it.", metavar="OUT")
    ] = None,
) -> None:
    """Measure video decoding: 32 and 120 frames of a minute of 720p with short and with long GOPs.

    Beside each backend run PyAV with a seek per frame, PyAV in sequence, and transformers' own loading, in
    turn and on one core. A row's peer is the quickest of them; a ratio above 1 is a win over it.
    """
    from mmserve.bench import media as bench

    names = None if backends == "installed" else tuple(dict.fromkeys(backends.split(",")))
    try:
        plan = bench.Plan(rounds=rounds, backends=names, cache_dir=cache_dir)
    except BadRequest as error:
        raise typer.BadParameter(error.public_message) from error
    bench.command(plan, json_out)
