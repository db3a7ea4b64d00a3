"""From a prefill command to the rows that are run, and to what tells their KV apart from all other.

Embeddings are read when a prompt is admitted: many prompts may wait, and theirs would fill the memory.
Knows nothing about scheduling or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve import messages as m
from mmserve.engine.runner import PromptRows, Runner, most_cached
from mmserve.errors import BadRequest
from mmserve.kv.identity import Identity, identity_rows
from mmserve.models.layout.llava_onevision import PromptLayout, Survivors, expand, survivors
from mmserve.request import Methods
from mmserve.tensors import tensors_of
from mmserve.transfer import open_lease

MAX_PROMPT_LOGPROBS = 1 << 14  # reported candidates of a prompt: they travel in one message


@dataclass(slots=True, kw_only=True)
class WaitingPrompt:
    """A prompt that has no pages yet. `arrived` numbers the commands of this worker."""

    command: m.PrefillPrompt
    arrived: int
    received_at: float
    layout: PromptLayout
    rows: Survivors
    identity: Identity | None

    def __len__(self) -> int:
        return len(self.rows.order)

    @property
    def headroom(self) -> int:
        """Slots for the answer that are taken with those of the prompt, so that they lie behind them."""
        command = self.command
        return 0 if command.hand_off else m.answer_slots(command.sampling, len(command.forced))

    @property
    def most_cached(self) -> int:
        """How many leading rows may come from the prefix cache."""
        if self.identity is None or self.wants_logits:
            return 0
        return most_cached(self.rows.is_visual, is_observed=self.is_observed)

    @property
    def is_observed(self) -> bool:
        return self.command.methods.kv != "none"

    @property
    def wants_logits(self) -> bool:
        return self.command.sampling.prompt_logprobs is not None

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The token of every row."""
        return self.layout.token_ids[self.rows.order]


def read_prompt(
    command: m.PrefillPrompt,
    *,
    arrived: int,
    received_at: float,
    media_tokens: tuple[int, int],
    directories: Sequence[Path],
) -> WaitingPrompt:
    """Lay a prompt out; raises what is wrong with it."""
    layout = expand(command.token_ids, [item.tokens for item in command.items], media_tokens)
    kept = [
        open_lease(item.lease, directories)["source"].astype(np.int32, copy=False) for item in command.items
    ]
    rows = survivors(layout, kept)
    if len(rows.order) == 0:
        raise BadRequest("Expected a prompt of at least one token, but it is empty")
    asked = command.sampling.prompt_logprobs
    if asked is not None and len(layout.token_ids) * (asked + 1) > MAX_PROMPT_LOGPROBS:
        raise BadRequest(
            f"Expected prompt_logprobs of at most {MAX_PROMPT_LOGPROBS} candidates in total, "
            f"but got {len(layout.token_ids)} tokens with {asked + 1} each"
        )
    return WaitingPrompt(
        command=command,
        arrived=arrived,
        received_at=received_at,
        layout=layout,
        rows=rows,
        identity=_identity(command, layout, rows, kept),
    )


def _identity(
    command: m.PrefillPrompt, layout: PromptLayout, rows: Survivors, kept: Sequence[NDArray[np.int32]]
) -> Identity | None:
    """What every row holds; None when an item does not say what it is."""
    if not all(item.key for item in command.items):
        return None
    return Identity(
        salt=command.salt.encode(),
        settings=_settings(command.methods),
        rows=identity_rows(
            token_ids=layout.token_ids[rows.order],
            is_visual=rows.is_visual,
            media=[
                (bytes.fromhex(item.key), source) for item, source in zip(command.items, kept, strict=True)
            ],
            order=rows.order,
            position=rows.position,
        ),
    )


def _settings(methods: Methods) -> bytes:
    """Everything that changes the KV of a prompt before a KV policy acts."""
    return f"{methods.prune} {methods.keep} {methods.attention} {methods.kv_dtype}".encode()


@torch.inference_mode()
def load_rows(prompt: WaitingPrompt, runner: Runner, directories: Sequence[Path]) -> PromptRows:
    """Read the media's embeddings out of their leases, and look up those of the text."""
    command, rows = prompt.command, prompt.rows
    embeddings = runner.embed(prompt.token_ids)
    visual: list[Tensor] = [
        tensors_of(item.lease, open_lease(item.lease, directories))["embeddings"] for item in command.items
    ]
    if visual:
        embeddings[torch.from_numpy(rows.is_visual)] = torch.cat(visual).to(embeddings)
    return PromptRows(
        embeddings=embeddings,
        order=rows.order,
        position=rows.position,
        is_visual=rows.is_visual,
        is_observed=prompt.is_observed,
        wants_logits=prompt.wants_logits,
    )
