"""The command `mmserve eval`: from its options to a plan. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmserve import options as shared
from mmserve.options import (
    KV,
    METHODS,
    Attention,
    AttentionDenseBelow,
    AttentionOptions,
    AttentionProfile,
    Fps,
    KeepImage,
    KVDtype,
    KVOptions,
    Model,
    NumFrames,
    Prune,
    PruneOptions,
    PruneTextImages,
)


def evaluate(
    suite: Annotated[str, typer.Option(help="Which questions: a comma list, or all.", metavar="NAME[,NAME]")],
    model: Model = "tiny",
    prune: Prune = "none",
    keep: Annotated[
        str | None,
        typer.Option(
            help="What --prune keeps; by default 0.25, inside the model what each paper keeps.",
            metavar="N_OR_RATIO",
            rich_help_panel=METHODS,
        ),
    ] = None,
    keep_image: KeepImage = None,
    prune_options: PruneOptions = None,
    prune_text_images: PruneTextImages = False,
    attention: Attention = "dense",
    attention_options: AttentionOptions = None,
    attention_dense_below: AttentionDenseBelow = None,
    attention_profile: AttentionProfile = None,
    kv: KV = "none",
    kv_budget: Annotated[
        str | None,
        typer.Option(help="Budgets of --kv; by default 0.25.", metavar="N_OR_RATIO", rich_help_panel=METHODS),
    ] = None,
    kv_options: KVOptions = None,
    kv_dtype: KVDtype = "auto",
    num_frames: NumFrames = None,
    fps: Fps = None,
    limit: Annotated[int, typer.Option(help="Questions of each suite.", min=1, metavar="N")] = 100,
    suite_seed: Annotated[int, typer.Option(help="Another seed, other clips.", min=0, metavar="N")] = 0,
    outputs: Annotated[
        Path | None,
        typer.Option(help="A JSON line per question and setting; continued if it exists.", metavar="F"),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - prints it.", metavar="OUT")
    ] = None,
) -> None:
    """Measure accuracy beside speed and memory, as a Markdown table.

    Method options take comma lists or "all". Every combination is compared with the dense run.
    """
    from mmserve.evaluation import run

    every_frame = num_frames is None and fps is None
    plan = run.Plan(
        suites=shared.usage(lambda: run.suite_names(suite)),
        sweep=shared.usage(
            lambda: run.sweep(
                prune=prune,
                keep=keep,
                keep_image=keep_image,
                prune_options=shared.read_options(prune_options),
                prune_text_images=prune_text_images,
                attention=attention,
                attention_options=shared.read_settings("--attention-option", attention_options),
                attention_dense_below=attention_dense_below,
                attention_profile=attention_profile,
                kv=kv,
                kv_budget=kv_budget,
                kv_options=shared.read_settings("--kv-option", kv_options),
                kv_dtype=kv_dtype,
            )
        ),
        limit=limit,
        seed=suite_seed,
        options=shared.media_options_of(run.ALL_FRAMES if every_frame else num_frames, fps),
    )
    for methods in plan.sweep:
        shared.check_options(methods)
    code = run.command(
        plan,
        model,
        lambda methods: shared.open_llm(model, methods, plan.options, None),
        outputs=outputs,
        json_out=json_out,
    )
    raise typer.Exit(code)
