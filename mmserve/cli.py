"""The command line. Answers and documents go to stdout; progress, logs and errors to stderr.

Exit codes: 0 done, 1 failed at run time, 2 wrong usage. Each command imports what it needs when it
runs, so that help is quick; what the commands do lives elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmserve import __version__
from mmserve import options as shared
from mmserve.bench.cli import app as bench
from mmserve.errors import BadRequest, ConfigError, MMServeError
from mmserve.evaluation.command import evaluate
from mmserve.evaluation.profiling import profile_attention
from mmserve.log import setup_logging
from mmserve.options import (
    KV,
    ApiKey,
    AsJson,
    Attention,
    AttentionDenseBelow,
    AttentionOptions,
    AttentionProfile,
    Fps,
    Keep,
    KeepImage,
    KVBudget,
    KVDtype,
    KVOptions,
    MaxTokens,
    MediaIo,
    Model,
    NumFrames,
    Prune,
    PruneOptions,
    PruneTextImages,
    methods_of,
    usage,
)
from mmserve.server.command import read_epd, serve

if TYPE_CHECKING:
    from mmserve.batch.answerers import Answerer

WRONG_USAGE = 2  # exit code

app = typer.Typer(
    name="mmserve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Vision-language models served in three stages: encode, prefill, decode.

    Each stage can be made smaller: visual tokens pruned, attention sparse, the KV cache compressed.
    """
    if version:
        typer.echo(f"mmserve {__version__}")
        raise typer.Exit


@app.command()
def ask(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar='FILE_OR_URL... "QUESTION"', help="Images, videos, and last the question."),
    ],
    model: Model = "tiny",
    prune: Prune = "none",
    keep: Keep = None,
    keep_image: KeepImage = None,
    prune_options: PruneOptions = None,
    prune_text_images: PruneTextImages = False,
    attention: Attention = "dense",
    attention_options: AttentionOptions = None,
    attention_dense_below: AttentionDenseBelow = None,
    attention_profile: AttentionProfile = None,
    kv: KV = "none",
    kv_budget: KVBudget = None,
    kv_options: KVOptions = None,
    kv_dtype: KVDtype = "auto",
    num_frames: NumFrames = None,
    fps: Fps = None,
    media_io_kwargs: MediaIo = None,
    max_tokens: MaxTokens = 64,
    show_tokens: Annotated[
        Path | None,
        typer.Option(help="Draw what --prune kept, merged and dropped on the frames.", metavar="OUT.png"),
    ] = None,
    show_attention: Annotated[
        Path | None,
        typer.Option(help="Draw what one head attends to, and what --attention computes.", metavar="OUT.png"),
    ] = None,
    epd: Annotated[
        str | None,
        typer.Option(help="Encode, prefill and decode processes; all in this one by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a question about images and videos: mmserve ask clip.mp4 "What happens?" """
    if len(inputs) < 2:
        raise typer.BadParameter('Expected files or URLs and then a "question"')
    from mmserve import ask as asking

    methods = methods_of(
        prune=prune,
        keep=keep,
        keep_image=keep_image,
        prune_options=prune_options,
        prune_text_images=prune_text_images,
        attention=attention,
        attention_options=attention_options,
        attention_dense_below=attention_dense_below,
        attention_profile=attention_profile,
        kv=kv,
        kv_budget=kv_budget,
        kv_options=kv_options,
        kv_dtype=kv_dtype,
    )
    options = shared.media_options_of(num_frames, fps, media_io_kwargs)
    workers = read_epd(epd)
    conversation = asking.messages(inputs[:-1], inputs[-1])
    for target in filter(None, (show_tokens, show_attention)):
        from mmserve import show

        usage(partial(show.check_target, target))
    with shared.open_llm(model, methods, options, workers) as llm:
        done = asking.ask(
            llm,
            conversation,
            max_tokens=max_tokens,
            as_json=as_json,
            report_tokens=show_tokens is not None,
            report_attention=show_attention is not None,
        )
    if show_tokens is not None:
        show.show_tokens(conversation, options, done.media, show_tokens)
    if show_attention is not None:
        show.show_attention(done, show_attention)


@app.command()
def batch(
    questions: Annotated[
        Path, typer.Argument(help="A JSON line per question, own or OpenAI's.", exists=True, dir_okay=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where answers go; continued if it exists.")
    ] = None,
    model: Model = "tiny",
    prune: Prune = "none",
    keep: Keep = None,
    keep_image: KeepImage = None,
    prune_options: PruneOptions = None,
    prune_text_images: PruneTextImages = False,
    attention: Attention = "dense",
    attention_options: AttentionOptions = None,
    attention_dense_below: AttentionDenseBelow = None,
    attention_profile: AttentionProfile = None,
    kv: KV = "none",
    kv_budget: KVBudget = None,
    kv_options: KVOptions = None,
    kv_dtype: KVDtype = "auto",
    num_frames: NumFrames = None,
    fps: Fps = None,
    media_io_kwargs: MediaIo = None,
    max_tokens: MaxTokens = 64,
    epd: Annotated[str, typer.Option(help="Encode, prefill and decode processes.")] = "1,1,1",
    server: Annotated[str | None, typer.Option(help="Ask a running server instead.", metavar="URL")] = None,
    api_key: ApiKey = None,
    concurrency: Annotated[int, typer.Option(help="Questions in flight together.", min=1, metavar="N")] = 16,
    limit: Annotated[int | None, typer.Option(help="Take the first N questions.", min=1, metavar="N")] = None,
    shard: Annotated[str, typer.Option(help="Take the i-th of n shares.", metavar="i/n")] = "1/1",
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again what failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every row and its files; answer nothing.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Print questions and answers at the end.")] = False,
) -> None:
    """Answer a file of questions; the same command given again continues a run that was stopped.

    Where the questions come with answers, the last line printed is the accuracy.
    """
    if output is None and not dry_run:
        raise typer.BadParameter("Expected a file for the answers: -o ANSWERS.jsonl")
    from mmserve.batch import command
    from mmserve.batch.answerers import LocalAnswerer, ServerAnswerer, extensions
    from mmserve.batch.runner import parse_shard

    methods = methods_of(
        prune=prune,
        keep=keep,
        keep_image=keep_image,
        prune_options=prune_options,
        prune_text_images=prune_text_images,
        attention=attention,
        attention_options=attention_options,
        attention_dense_below=attention_dense_below,
        attention_profile=attention_profile,
        kv=kv,
        kv_budget=kv_budget,
        kv_options=kv_options,
        kv_dtype=kv_dtype,
    )
    options = shared.media_options_of(num_frames, fps, media_io_kwargs)
    workers = read_epd(epd)
    job = command.Job(
        questions=questions,
        output=output or Path(os.devnull),
        methods=None if server else methods,
        max_tokens=max_tokens,
        concurrency=concurrency,
        limit=limit,
        shard=usage(lambda: parse_shard(shard)),
        retry_errors=retry_errors,
        table=table,
    )

    @contextmanager
    def answerer() -> Iterator[Answerer]:
        if server:
            remote = ServerAnswerer(
                server,
                api_key=api_key,
                options=options,
                extensions=extensions(methods),
                concurrency=concurrency,
            )
            with closing(remote):
                yield remote
        else:
            with shared.open_llm(model, methods, options, workers) as llm:
                yield LocalAnswerer(llm, methods, options)

    raise typer.Exit(command.dry_run(job) if dry_run else command.answer(job, answerer))


app.command("eval")(evaluate)
app.command()(serve)
app.command("profile-attention")(profile_attention)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has and what it lacks."""
    from mmserve import doctor as doctoring

    found = doctoring.report()
    typer.echo(json.dumps(found) if as_json else doctoring.render(found))
    raise typer.Exit(1 if any(lack["required"] for lack in found["missing"]) else 0)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods that make each stage smaller."""
    from mmserve import catalogue

    entries = catalogue.describe()
    typer.echo(json.dumps(entries) if as_json else catalogue.render(entries))


@app.command("check-config")
def check_config(
    config: Annotated[Path, typer.Argument(metavar="F.yaml", exists=True)],
) -> None:
    """Check a configuration file and print it with every default and limit."""
    import yaml

    from mmserve.catalogue import check_methods
    from mmserve.config import load_config, to_mapping
    from mmserve.methods import deployed_methods

    resolved = load_config(config)
    try:
        check_methods(deployed_methods(resolved))
    except BadRequest as error:
        raise ConfigError(error.public_message) from error
    mapping = to_mapping(resolved, hide_keys=True)
    typer.echo(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True).rstrip())


def main() -> int:
    """Run the command line; the exit code. Errors are one line on stderr, MMSERVE_LOG=debug shows all."""
    try:
        setup_logging(os.environ.get("MMSERVE_LOG") or "warning")
        app(prog_name="mmserve")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except ConfigError as error:
        return _failed(error.public_message, WRONG_USAGE)
    except MMServeError as error:
        return _failed(error.public_message)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a mistake of ours: still one line, unless debugging
        return _failed(f"{type(error).__name__}: {error}")
    return 0


def _failed(message: str, code: int = 1) -> int:
    logging.getLogger(__name__).debug("failed", exc_info=True)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code
