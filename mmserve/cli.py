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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmserve import __version__
from mmserve.bench.cli import app as bench
from mmserve.errors import MMServeError
from mmserve.log import setup_logging
from mmserve.options import (
    KV,
    METHODS,
    ApiKey,
    AsJson,
    Attention,
    Fps,
    Keep,
    KeepImage,
    KVBudget,
    KVDtype,
    MaxTokens,
    MediaIo,
    Model,
    NumFrames,
    Prune,
    PruneOptions,
    PruneTextImages,
    check_options,
    methods_of,
    read_options,
    usage,
)
from mmserve.server.command import read_epd, serve

if TYPE_CHECKING:
    from mmserve.batch.answerers import Answerer
    from mmserve.llm import LLM
    from mmserve.request import MediaOptions, Methods

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
    kv: KV = "none",
    kv_budget: KVBudget = None,
    kv_dtype: KVDtype = "auto",
    num_frames: NumFrames = None,
    fps: Fps = None,
    media_io_kwargs: MediaIo = None,
    max_tokens: MaxTokens = 64,
    show_tokens: Annotated[
        Path | None,
        typer.Option(help="Draw what --prune kept, merged and dropped on the frames.", metavar="OUT.png"),
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
        kv=kv,
        kv_budget=kv_budget,
        kv_dtype=kv_dtype,
    )
    options = _options(num_frames, fps, media_io_kwargs)
    workers = read_epd(epd)
    conversation = asking.messages(inputs[:-1], inputs[-1])
    if show_tokens is not None:
        from mmserve import show

        usage(lambda: show.check_target(show_tokens))
    with _llm(model, methods, options, workers) as llm:
        done = asking.ask(
            llm,
            conversation,
            max_tokens=max_tokens,
            as_json=as_json,
            report_tokens=show_tokens is not None,
        )
    if show_tokens is not None:
        show.show_tokens(conversation, options, done.media, show_tokens)


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
    kv: KV = "none",
    kv_budget: KVBudget = None,
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
        kv=kv,
        kv_budget=kv_budget,
        kv_dtype=kv_dtype,
    )
    options = _options(num_frames, fps, media_io_kwargs)
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
            with _llm(model, methods, options, workers) as llm:
                yield LocalAnswerer(llm, methods, options)

    raise typer.Exit(command.dry_run(job) if dry_run else command.answer(job, answerer))


@app.command("eval")
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
    kv: KV = "none",
    kv_budget: Annotated[
        str | None,
        typer.Option(help="Budgets of --kv; by default 0.25.", metavar="N_OR_RATIO", rich_help_panel=METHODS),
    ] = None,
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
        suites=usage(lambda: run.suite_names(suite)),
        sweep=usage(
            lambda: run.sweep(
                prune=prune,
                keep=keep,
                keep_image=keep_image,
                prune_options=read_options(prune_options),
                prune_text_images=prune_text_images,
                attention=attention,
                kv=kv,
                kv_budget=kv_budget,
                kv_dtype=kv_dtype,
            )
        ),
        limit=limit,
        seed=suite_seed,
        options=_options(run.ALL_FRAMES if every_frame else num_frames, fps),
    )
    for methods in plan.sweep:
        check_options(methods)
    code = run.command(
        plan,
        model,
        lambda methods: _llm(model, methods, plan.options, None),
        outputs=outputs,
        json_out=json_out,
    )
    raise typer.Exit(code)


app.command()(serve)


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
    check_methods(deployed_methods(resolved))
    mapping = to_mapping(resolved, hide_keys=True)
    typer.echo(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True).rstrip())


def main() -> int:
    """Run the command line; the exit code. Errors are one line on stderr, MMSERVE_LOG=debug shows all."""
    try:
        setup_logging(os.environ.get("MMSERVE_LOG") or "warning")
        app(prog_name="mmserve")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except MMServeError as error:
        return _failed(error.public_message)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a mistake of ours: still one line, unless debugging
        return _failed(f"{type(error).__name__}: {error}")
    return 0


def _failed(message: str) -> int:
    logging.getLogger(__name__).debug("failed", exc_info=True)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 1


def _options(num_frames: int | None, fps: float | None, media_io: str | None = None) -> MediaOptions:
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


def _llm(model: str, methods: Methods, options: MediaOptions, epd: tuple[int, int, int] | None) -> LLM:
    import msgspec

    from mmserve.llm import LLM
    from mmserve.media.options import media_io_kwargs

    settings: dict[str, Any] = msgspec.to_builtins(methods)
    return LLM(model, epd=epd, media_io_kwargs=media_io_kwargs(options), **settings)
