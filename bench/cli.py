"""The commands of `mmserve bench`. Each imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmserve.options import (
    KV,
    Attention,
    AttentionDenseBelow,
    AttentionOptions,
    AttentionProfile,
    Keep,
    KVBudget,
    KVDtype,
    KVOptions,
    Prune,
    PruneOptions,
    methods_of,
    read_settings,
    usage,
)

app = typer.Typer(no_args_is_help=True, help="Measure speed, beside a peer on the same weights.")

Geometry = Annotated[
    str,
    typer.Option(
        help="The model's sizes, with random weights: ov-mini, ov-0.5b, ov-7b, or nano for a quick try.",
        metavar="NAME",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads of either side; by default all cores.", min=1, metavar="N")
]
Seed = Annotated[int, typer.Option(help="Another seed, other weights and videos.", min=0, metavar="N")]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where what is made is kept; by default the user's cache.", file_okay=False),
]
JsonOut = Annotated[
    Path | None, typer.Option("--json", help="Write the report as JSON; - prints it.", metavar="OUT")
]


def _named(text: str, every: str = "all") -> tuple[str, ...] | None:
    """The names of a comma list, each once; None for all of them."""
    return None if text == every else tuple(dict.fromkeys(text.split(",")))


@app.command()
def engine(
    vs: Annotated[
        str | None,
        typer.Option(help="The peer: transformers. Without one, only mmserve is measured.", metavar="PEER"),
    ] = None,
    geometry: Geometry = "ov-mini",
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
    threads: Threads = None,
    seed: Seed = 0,
    cache_dir: CacheDir = None,
    json_out: JsonOut = None,
) -> None:
    """Measure the engine: first token, second question, batches, shared videos, decode, memory.

    Both sides run the same checkpoint and requests, each in a process of its own, in turn: A B A B. They
    must give the same numbers before anything is timed. A ratio above 1 is a win over the peer; it is
    the median over the rounds. The table and progress go to stderr.
    """
    from mmserve.bench import engine as bench

    plan = usage(
        lambda: bench.Plan(
            geometry=geometry,
            vs=vs,
            metrics=_named(metrics),
            rounds=rounds,
            frames=frames,
            tokens=tokens,
            peer_sample=peer_sample,
            threads=threads,
            seed=seed,
            cache_dir=cache_dir,
        )
    )
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
    cache_dir: CacheDir = None,
    json_out: JsonOut = None,
) -> None:
    """Measure video decoding: 32 and 120 frames of a minute of 720p with short and with long GOPs.

    Beside each backend run PyAV with a seek per frame, PyAV in sequence, and transformers' own loading, in
    turn and on one core. A row's peer is the quickest of them; a ratio above 1 is a win over it.
    """
    from mmserve.bench import media as bench

    names = _named(backends, every="installed")
    plan = usage(lambda: bench.Plan(rounds=rounds, backends=names, cache_dir=cache_dir))
    bench.command(plan, json_out)


@app.command()
def methods(
    prune: Prune = "none",
    keep: Keep = None,
    prune_options: PruneOptions = None,
    attention: Attention = "dense",
    attention_options: AttentionOptions = None,
    attention_dense_below: AttentionDenseBelow = None,
    attention_profile: AttentionProfile = None,
    kv: KV = "none",
    kv_budget: KVBudget = None,
    kv_options: KVOptions = None,
    kv_dtype: KVDtype = "auto",
    geometry: Geometry = "ov-mini",
    metrics: Annotated[
        str,
        typer.Option(
            help="What to measure: a comma list of ttft, decode, throughput; or all.",
            metavar="NAME[,NAME]",
        ),
    ] = "all",
    rounds: Annotated[int, typer.Option(help="Paired runs of every metric.", min=1, metavar="N")] = 5,
    frames: Annotated[int, typer.Option(help="Frames of every video.", min=1, metavar="N")] = 32,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    json_out: JsonOut = None,
) -> None:
    """Measure what methods save: first token cold and warm, decode at batch 8, 16 requests at once.

    The peer is mmserve without them, on the same random weights, in turn: A B A B. A ratio above 1 is a win.
    saved_to_prune sets what reduction saves of a warm first token against the time it takes itself. What the
    methods cost in accuracy is for `mmserve eval` to say.
    """
    from mmserve.bench import methods as bench

    plan = usage(
        lambda: bench.Plan(
            methods=methods_of(
                prune=prune,
                keep=keep,
                prune_options=prune_options,
                attention=attention,
                attention_options=attention_options,
                attention_dense_below=attention_dense_below,
                attention_profile=attention_profile,
                kv=kv,
                kv_budget=kv_budget,
                kv_options=kv_options,
                kv_dtype=kv_dtype,
            ),
            geometry=geometry,
            metrics=_named(metrics),
            rounds=rounds,
            frames=frames,
            threads=threads,
            cache_dir=cache_dir,
        )
    )
    bench.command(plan, json_out)


@app.command()
def carriers(
    geometry: Geometry = "ov-mini",
    frames: Annotated[
        str, typer.Option(help="Frames of the short video and of the long one.", metavar="N,N")
    ] = "32,512",
    rounds: Annotated[int, typer.Option(help="Paired runs of either video.", min=1, metavar="N")] = 5,
    threads: Threads = None,
    seed: Seed = 0,
    cache_dir: CacheDir = None,
    json_out: JsonOut = None,
) -> None:
    """Measure what carriers hold: a decode step after a long video beside one after a short one, and KV.

    The same process answers both with --prune carriers, in turn: A B A B. The ratio of a step is that of the
    short video to the long one; kv_slots_per_frame says how many slots of a layer and head a frame leaves.
    """
    from mmserve.bench import carriers as bench

    plan = usage(
        lambda: bench.Plan(
            geometry=geometry,
            frames=bench.read_frames(frames),
            rounds=rounds,
            threads=threads,
            seed=seed,
            cache_dir=cache_dir,
        )
    )
    bench.command(plan, json_out)


@app.command()
def attention(
    attention: Attention = "mminference",
    attention_options: AttentionOptions = None,
    attention_profile: AttentionProfile = None,
    geometry: Geometry = "ov-mini",
    tokens: Annotated[
        str, typer.Option(help="Visual tokens of the prompts: a comma list.", metavar="N[,N]")
    ] = "16384,32768",
    rounds: Annotated[int, typer.Option(help="Paired runs of every length.", min=1, metavar="N")] = 5,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Another seed, other prompts.", min=0, metavar="N")] = 0,
    json_out: JsonOut = None,
) -> None:
    """Measure one layer's attention over a long video under a sparse pattern, its index included.

    The peer is dense attention over the same queries and keys, which have a grid in them, in chunks as in
    serving: A B A B. A ratio above 1 is a win; what the pattern computes and sees is noted beside it.
    """
    from mmserve.bench import attention as bench

    plan = usage(
        lambda: bench.Plan(
            attention=attention,
            options=read_settings("--attention-option", attention_options),
            profile=attention_profile,
            geometry=geometry,
            tokens=bench.read_tokens(tokens),
            rounds=rounds,
            threads=threads,
            seed=seed,
        )
    )
    bench.command(plan, json_out)


@app.command()
def encode(
    parts: Annotated[
        str,
        typer.Option(
            help="What to measure: a comma list of overlap, workers; or all.", metavar="NAME[,NAME]"
        ),
    ] = "all",
    geometry: Annotated[
        str | None,
        typer.Option(
            help="The model's sizes, with random weights; by default ov-balanced for overlap, ov-mini for "
            "workers.",
            metavar="NAME",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            help="Frames of every video; by default 128 for overlap, 256 for workers.", min=1, metavar="N"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Paired runs of either part.", min=1, metavar="N")] = 7,
    seed: Seed = 0,
    cache_dir: CacheDir = None,
    json_out: JsonOut = None,
) -> None:
    """Measure what the encode stage gains: stages that overlap, and encode workers that share a video.

    Both sides are mmserve, with a process per stage and one thread each: with and without overlap, with
    two encode workers and with one. They must give the same tokens before anything is timed.
    """
    from mmserve.bench import encode as bench

    names = _named(parts)
    plan = usage(
        lambda: bench.Plan(
            parts=names, geometry=geometry, frames=frames, rounds=rounds, seed=seed, cache_dir=cache_dir
        )
    )
    bench.command(plan, json_out)


@app.command()
def kv(
    kv_dtype: Annotated[
        str,
        typer.Option(help="Types of pages: a comma list of bf16, int8, int4, fp8.", metavar="NAME[,NAME]"),
    ] = "int8,int4",
    kv_budget: Annotated[
        str, typer.Option(help="Shares of the visual slots that are kept.", metavar="N[,N]")
    ] = "1",
    geometry: Geometry = "ov-mini",
    metrics: Annotated[
        str,
        typer.Option(
            help="What to measure: a comma list of capacity, handoff, step; or all.", metavar="NAME[,NAME]"
        ),
    ] = "all",
    frames: Annotated[int, typer.Option(help="Frames of a request's video.", min=1, metavar="N")] = 32,
    context: Annotated[
        int, typer.Option(help="Slots of each sequence of a step.", min=64, metavar="N")
    ] = 32_768,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1, metavar="N")] = 8,
    rounds: Annotated[int, typer.Option(help="Paired runs of a step.", min=1, metavar="N")] = 5,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    json_out: JsonOut = None,
) -> None:
    """Measure what smaller KV is worth on a decode worker: requests in the same memory, hand-off, steps.

    The peer keeps every slot in pages of bf16. KV is synthetic: pages are counted in whole, with scales, what
    is newest and what is reserved for the answer, but nothing is said of accuracy.
    """
    from mmserve.bench import kv as bench

    plan = usage(
        lambda: bench.Plan(
            dtypes=_named(kv_dtype) or bench.DTYPES,
            budgets=bench.read_budgets(kv_budget),
            geometry=geometry,
            metrics=_named(metrics),
            frames=frames,
            context=context,
            batch=batch,
            rounds=rounds,
            threads=threads,
            cache_dir=cache_dir,
        )
    )
    bench.command(plan, json_out)
