"""Curriculum of `tiny`: clips with the tower, then long, mixed and streamed prompts on a frozen tower.

Continues a trained model phase by phase, resumable from RUN/PHASE.safetensors; on a share of the rows
VideoScan's semantic mask takes the place of dense attention. Knows nothing about suites.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.evaluation.checkpoint import load_state, save_state
from mmserve.evaluation.curriculum import (
    LOCAL,
    TEMPORAL,
    Lesson,
    Seen,
    frame_labels,
    image_row,
    mixed_row,
    moment,
    still_row,
    stream_row,
    video_row,
)
from mmserve.evaluation.tiny_data import pixels
from mmserve.evaluation.tiny_forward import embed_row, row_states
from mmserve.evaluation.tiny_model import POOLED, save_checkpoint
from mmserve.evaluation.tiny_pools import Item, Pools, embed_frames
from mmserve.evaluation.tiny_rows import SOUGHT, Row, TinyTokenizer, frame_ends
from mmserve.evaluation.train_phases import Phase
from mmserve.evaluation.train_steps import decayed, schedule

ITEMS = 6  # of a mixed prompt, at most
TOGETHER = 3000  # tokens that go through the model at once


class Probe(nn.Module):
    """What a frame's last token should know, read off two layers; dropped after training."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        # states that are read: what is in sight, which item, what is asked about, what has happened
        self.early, self.middle, self.late = 1, layers // 2, layers - 2
        self.local = nn.Linear(width, sum(LOCAL))
        self.temporal = nn.Linear(width, sum(TEMPORAL))
        self.item = nn.Linear(width, ITEMS)
        self.name = nn.Linear(width, len(SOUGHT))
        self.paint = nn.Linear(width, 3)  # mean colour under a token, background included

    def name_loss(self, states: list[Tensor], row: Row) -> Tensor:
        """Of the words that name an object in a question: they should find what is asked about it."""
        if len(row.named_at) == 0:
            return torch.zeros(())
        return functional.cross_entropy(self.name(states[self.middle][0, row.named_at]).float(), row.sought)

    def item_loss(self, states: list[Tensor], row: Row) -> Tensor:
        inside = (row.item >= 0).nonzero()[:, 0]
        return functional.cross_entropy(self.item(states[self.early][0, inside]).float(), row.item[inside])

    def loss(self, states: list[Tensor], row: Row, labels: tuple[Tensor, Tensor]) -> Tensor:
        ends = frame_ends(row)
        total = states[0].new_zeros((), dtype=torch.float32)
        for layer, head, sizes, wanted in zip(
            (self.early, self.late), (self.local, self.temporal), (LOCAL, TEMPORAL), labels, strict=True
        ):
            scores = head(states[layer][0, ends]).float()
            parts = [
                functional.cross_entropy(part, wanted[: len(ends), index], reduction="sum") / len(ends)
                for index, part in enumerate(scores.split(list(sizes), 1))
                if bool((wanted[: len(ends), index] >= 0).any())
            ]
            total = total + torch.stack(parts).sum() / len(sizes)
        return total


@dataclass(slots=True)
class Ordered:
    """A row to build once its media are embedded."""

    kind: str
    items: list[Item]
    carriers: bool
    tokens: list[Tensor] = field(default_factory=list)


def _together(lengths: list[int]) -> list[tuple[int, int]]:
    """Ranges of neighbours that hold at most `TOGETHER` tokens, or one row."""
    ranges, first, size = [], 0, 0
    for index, length in enumerate(lengths):
        if index > first and size + length > TOGETHER:
            ranges.append((first, index))
            first, size = index, 0
        size += length
    return [*ranges, (first, len(lengths))]


def still(rng: np.random.Generator, item: Item) -> Item:
    """One frame of a clip as a video of its own: what a single carrier must hold."""
    frame = int(rng.integers(item.scene.frames))
    return Item(moment(item.scene, frame), item.content[frame : frame + 1])


class Curriculum:
    """The model in training with its probe and its run directory."""

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        tokenizer: Tokenizer,
        run: Path,
        seed: int,
        workers: int,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.tokenizer, self.run, self.seed, self.workers = model, tokenizer, run, seed, workers
        self.started = time.monotonic()
        self.words = TinyTokenizer(tokenizer)
        text = model.config.text_config
        self.probe = Probe(text.hidden_size, text.num_hidden_layers).to(model.device)
        self.whole = nn.ModuleDict({"tiny": model, "probe": self.probe})

    def train(self, phase: Phase, save_every_s: float = 420.0) -> None:
        state = self.run / f"{phase.name}.safetensors"
        optimiser = self._optimiser(phase)
        step = load_state(state, self.whole, optimiser) if state.exists() else 0
        if step >= phase.steps:
            return
        tower = None if phase.tower_peak else self.model
        pools = Pools(self.seed, phase.supplies, tower, self.workers)
        saved = time.monotonic()
        rows: dict[str, list[float]] = {}
        while step < phase.steps:
            pools.advance(step)
            rng = np.random.default_rng([self.seed, 5, len(phase.name), step])
            rate = schedule(step, phase.steps, 1.0, warmup=40, floor=phase.floor)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["peak"]
            for kind, loss, probed, named in self._step(phase, pools, rng, optimiser):
                rows.setdefault(kind, []).append(loss)
                rows.setdefault(f"{kind} probe", []).append(probed)
                rows.setdefault(f"{kind} name", []).append(named)
            step += 1
            if step % 20 == 0:
                means = {kind: round(float(np.mean(losses)), 4) for kind, losses in sorted(rows.items())}
                self.log(phase.name, step, **means)
                rows.clear()
            if step == phase.steps or time.monotonic() - saved > save_every_s:
                save_state(state, self.whole, optimiser, step)
                saved = time.monotonic()
        pools.close()

    def _optimiser(self, phase: Phase) -> torch.optim.Optimizer:
        inner = self.model.model
        language = [*inner.language_model.parameters(), inner.image_newline]
        groups: list[dict[str, Any]] = [group | {"peak": phase.peak} for group in decayed(language)]
        groups += [group | {"peak": phase.peak} for group in decayed(list(self.probe.parameters()))]
        tower = [*inner.vision_tower.parameters(), *inner.multi_modal_projector.parameters()]
        for parameter in tower:
            parameter.requires_grad_(phase.tower_peak > 0)
        if phase.tower_peak:
            groups += [group | {"peak": phase.tower_peak} for group in decayed(tower)]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98))

    def _order(self, phase: Phase, pools: Pools, rng: np.random.Generator) -> list[Ordered]:
        ordered = []
        for kind, count in phase.menu.items():
            for _ in range(int(count + rng.random())):
                carriers = bool(rng.random() < phase.carriers.get(kind, 0.0))
                if kind == "still":
                    items = [still(rng, pools.draw("clip", rng))]
                elif kind != "mixed":
                    lesson: Lesson = kind  # type: ignore[assignment]
                    items = [pools.draw(lesson, rng)]
                elif rng.random() < 0.08:
                    items = [pools.draw("image", rng)]
                else:
                    size = int(rng.integers(2, phase.longest_mix + 1, 2).min())  # short ones teach as well
                    items = [pools.draw("clip" if rng.random() < 0.5 else "image", rng) for _ in range(size)]
                ordered.append(Ordered(kind, items, carriers))
        return ordered

    def _build(self, order: Ordered, rng: np.random.Generator) -> Row:
        seen = [Seen(item.scene, tokens) for item, tokens in zip(order.items, order.tokens, strict=True)]
        if order.kind == "mixed" and len(seen) == 1:
            return image_row(rng, self.words, seen[0])
        if order.kind == "mixed":
            return mixed_row(rng, self.words, seen, carriers=order.carriers, most=4)
        if order.kind == "stream":
            return stream_row(rng, self.words, seen[0], carriers=order.carriers, moments=8)
        if order.kind == "still":
            return still_row(rng, self.words, seen[0], carriers=order.carriers)
        views = 3 if order.kind in ("varied", "long") else 1
        return video_row(
            rng, self.words, seen[0], carriers=order.carriers, views=views, most=9 if views == 1 else 7
        )

    def _step(
        self, phase: Phase, pools: Pools, rng: np.random.Generator, optimiser: torch.optim.Optimizer
    ) -> list[tuple[str, float, float, float]]:
        """One update; each row's kind, mean loss of its answers, and losses of its probes."""
        optimiser.zero_grad(set_to_none=True)
        ordered = self._order(phase, pools, rng)
        leaves: list[tuple[Tensor, Tensor]] = []
        paint = torch.zeros(())
        if phase.tower_peak:
            leaves, paint = self._see(ordered)
        else:
            for order in ordered:
                order.tokens = [item.content.view(torch.bfloat16) for item in order.items]
        rows = [self._build(order, rng) for order in ordered]
        total = sum(float(row.weights.sum()) for row in rows)
        losses = []
        for first, last in _together([len(row.tokens) for row in rows]):
            losses += self._losses(ordered[first:last], rows[first:last], total, len(rows))
        if leaves:
            outputs = [output for output, leaf in leaves if leaf.grad is not None]
            grads = [leaf.grad for _, leaf in leaves if leaf.grad is not None]
            torch.autograd.backward([*outputs, paint], [*grads, None])
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return losses

    def _losses(
        self, ordered: list[Ordered], rows: list[Row], total: float, count: int
    ) -> list[tuple[str, float, float, float]]:
        """Gradients of some of a step's rows; `total` weight and `count` are of all its rows."""
        inner = self.model.model
        table = inner.get_input_embeddings().weight
        with torch.autocast("cpu", torch.bfloat16):
            states = row_states(
                inner.language_model,
                [embed_row(row, table, inner.image_newline) for row in rows],
                rows,
                carriers=[order.carriers for order in ordered],
            )
        logits = torch.cat(
            [of_row[-1][0, row.asked_at] for of_row, row in zip(states, rows, strict=True)]
        ).float()
        wanted = torch.cat([row.wanted for row in rows])
        answers = functional.cross_entropy(logits @ table.T, wanted, reduction="none")
        loss = torch.zeros(())
        losses = []
        parts = answers.split([len(row.wanted) for row in rows])
        for order, row, of_row, part in zip(ordered, rows, states, parts, strict=True):
            probed = torch.zeros(())
            with torch.autocast("cpu", torch.bfloat16):
                named = self.probe.name_loss(of_row, row)
                if order.kind == "mixed":
                    probed = self.probe.item_loss(of_row, row)
                elif order.carriers:  # elsewhere a frame's last token is one of many
                    probed = self.probe.loss(of_row, row, frame_labels(order.items[0].scene))
            right = (part * row.weights).sum()
            loss = loss + right / total + (0.5 * named + 0.8 * probed) / count
            name = order.kind + ("+" if order.carriers else "")
            mean = float(right.detach() / row.weights.sum())
            losses.append((name, mean, float(probed.detach()), float(named.detach())))
        loss.backward()
        return losses

    def _see(self, ordered: list[Ordered]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Tokens of all media with the tower in training.

        Rows get leaves, whose gradients go back through the tower at once; also returns the loss of
        reading the mean colour under each token.
        """
        leaves: list[tuple[Tensor, Tensor]] = []
        paint = torch.zeros(())
        for image in (False, True):
            wanted = [
                (order, item)
                for order in ordered
                for item in order.items
                if (len(item.content) == 1 and order.kind == "mixed") == image
            ]
            if not wanted:
                continue
            frames = pixels(torch.cat([item.content for _, item in wanted]).numpy())
            with torch.autocast("cpu", torch.bfloat16):
                output = embed_frames(self.model, frames, pooled=not image)
                painted = self.probe.paint(output).float()
            side = POOLED * (2 if image else 1)
            truth = functional.adaptive_avg_pool2d(frames, side).flatten(2).transpose(1, 2)
            paint = paint + (painted - truth).square().mean()
            leaf = output.detach().requires_grad_()
            leaves.append((output, leaf))
            parts = leaf.split([len(item.content) for _, item in wanted])
            for (order, _), part in zip(wanted, parts, strict=True):
                order.tokens.append(part[0] if image else part)
        for order in ordered:  # pictures were appended after clips: back to the order of the items
            if order.kind == "mixed":
                clips = [tokens for tokens in order.tokens if tokens.dim() == 3]
                crops = [tokens for tokens in order.tokens if tokens.dim() == 2]
                order.tokens = [(crops if len(item.content) == 1 else clips).pop(0) for item in order.items]
        return leaves, paint

    def log(self, phase: str, step: int, **values: float) -> None:
        row = {"phase": phase, "step": step, "seconds": round(time.monotonic() - self.started, 1), **values}
        with (self.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def save(self, folder: Path) -> None:
        save_checkpoint(self.model, self.tokenizer, folder)
