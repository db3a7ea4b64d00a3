"""`mmserve profile-attention`: which lines each head of a model should have, found on some clips.

Answers questions about the clips, records what attention saw, and searches. Imports what it needs when it
runs. Knows nothing about patterns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmserve.errors import BadRequest
from mmserve.options import NumFrames, usage

if TYPE_CHECKING:
    from mmserve.attention.profile import Inputs
    from mmserve.attention.search import Plan, Recorded

QUESTION = "Describe what happens."


def profile_attention(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub name.")],
    clips: Annotated[
        list[Path],
        typer.Argument(
            metavar="CLIPS...",
            help="Images and videos, or files of questions (.jsonl) as `mmserve batch` takes them.",
            exists=True,
            dir_okay=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the profile goes.", metavar="F.json")],
    question: Annotated[
        str, typer.Option(help="What is asked about clips that come without a question.")
    ] = QUESTION,
    sink: Annotated[int, typer.Option(help="First tokens that every row sees.", min=0, metavar="N")] = 128,
    local: Annotated[int, typer.Option(help="Tokens of a plain local band.", min=1, metavar="N")] = 1024,
    budget: Annotated[
        float, typer.Option(help="What a head may cost, as a share of dense attention.", metavar="RATIO")
    ] = 0.35,
    num_frames: NumFrames = None,
) -> None:
    """Find out offline which sparse lines suit each head of a model, for --attention mminference.

    All candidates are brought to the same cost, that of the kernel here; a head takes the one whose output is
    nearest to dense attention's. One clip as long as what is to be served is enough.
    """
    from mmserve.attention.search import Plan

    if not 0 < budget <= 1:
        raise typer.BadParameter(f"Expected --budget above 0 and at most 1, but got {budget:g}")
    if not output.resolve().parent.is_dir():
        raise BadRequest(f"Expected a file in a folder that exists, but got {output}")
    plan = Plan(sink=sink, local=local, budget=budget)
    text = find_profile(model, clips, question, plan, num_frames)
    output.write_text(text, encoding="utf-8")


def find_profile(model: str, clips: Sequence[Path], question: str, plan: Plan, num_frames: int | None) -> str:
    """The profile as JSON; progress goes to stderr."""
    from mmserve.attention.search import search

    prompts = record(model, clips, question, num_frames)
    inputs = inputs_of(clips, question, prompts)
    profile = search(prompts, plan, model=model, inputs=inputs, tell=lambda line: typer.echo(line, err=True))
    return profile.to_json()


def record(model: str, clips: Sequence[Path], question: str, num_frames: int | None) -> list[Recorded]:
    """Every prompt as attention saw it; raises what is wrong with one."""
    from mmserve.ask import messages
    from mmserve.batch.questions import read_questions
    from mmserve.evaluation.recording import METHODS, recording
    from mmserve.llm import LLM
    from mmserve.sampling import SamplingParams

    conversations: list[Sequence[dict[str, Any]]] = []
    for clip in clips:
        if clip.suffix != ".jsonl":
            conversations.append(messages([str(clip)], question))
            continue
        for row in read_questions(clip):
            if row.problem is not None:
                raise row.problem
            conversations.append(row.messages)
    with recording() as recorded, usage(lambda: LLM(model, num_frames=num_frames)) as llm:
        for conversation in conversations:
            llm.chat(conversation, SamplingParams(max_tokens=1), methods=METHODS)
    return recorded


def inputs_of(clips: Sequence[Path], question: str, prompts: Sequence[Recorded]) -> Inputs:
    """What tells these prompts apart from others: files by content, and the question."""
    from mmserve.attention.profile import Inputs

    digest = hashlib.sha256(question.encode())
    for clip in clips:
        digest.update(hashlib.sha256(clip.read_bytes()).digest())
    tokens = sum(len(prompt.is_visual) for prompt in prompts)
    return Inputs(digest=digest.hexdigest(), prompts=len(prompts), tokens=tokens)
