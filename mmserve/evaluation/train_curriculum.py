"""Curriculum of `tiny` on its frozen tower: clips, then long, mixed and streamed prompts as well.

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
from mmserve.evaluation.clipworld import DIRECTIONS
from mmserve.evaluation.curriculum import (
    LOCAL,
    SUMMARY,
    TEMPORAL,
    Lesson,
    Seen,
    frame_labels,
    image_row,
    mixed_row,
    moment,
    still_row,
    stream_row,
    summary_labels,
    under_tokens,
    until,
    video_row,
)
from mmserve.evaluation.tiny_forward import RowAttention, embed_row, row_states
from mmserve.evaluation.tiny_model import POOLED, save_checkpoint
from mmserve.evaluation.tiny_pools import Item, Pools
from mmserve.evaluation.tiny_rows import SOUGHT, Row, TinyTokenizer, frame_ends
from mmserve.evaluation.train_phases import Phase
from mmserve.evaluation.train_steps import decayed, schedule
from mmserve.pruning.base import Pruner, make_pruner

FACTS = 9  # about a scene, roughly: what the other classes of SUMMARY say is "nothing"
ITEMS = 6  # of a mixed prompt, at most
TOGETHER = 3000  # tokens that go through the model at once
# what takes tokens away in training, in these shares: one method that keeps what matters, one that does not
PRUNERS = {"holitom": 0.4, "random": 0.4, "visionzip": 0.1, "uniform": 0.1}
KEEPS = (0.1, 0.1, 0.15, 0.25, 0.25, 0.5)


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
        self.way, self.centre = nn.Linear(width, len(DIRECTIONS) + 1), nn.Linear(width, 2)
        self.summary = nn.Linear(width, sum(SUMMARY))

    def name_loss(self, states: list[Tensor], row: Row) -> Tensor:
        """Of the words that name an object in a question: they should find what is asked about it."""
        if len(row.named_at) == 0:
            return torch.zeros(())
        return functional.cross_entropy(self.name(states[self.middle][0, row.named_at]).float(), row.sought)

    def summary_loss(self, states: list[Tensor], row: Row, items: list[Item]) -> Tensor:
        """Of the newlines after items: they should know what was shown."""
        shown = [until(items[item].scene, frames) for _, item, frames in row.ended]
        wanted = torch.stack([summary_labels(scene) for scene in shown])
        scores = self.summary(states[self.middle][0, [at for at, _, _ in row.ended]]).float()
        parts = [
            functional.cross_entropy(part, wanted[:, index], reduction="sum", ignore_index=-100)
            for index, part in enumerate(scores.split(list(SUMMARY), 1))
        ]
        return torch.stack(parts).sum() / (len(shown) * FACTS)

    def token_loss(self, states: list[Tensor], row: Row, order: Ordered) -> Tensor:
        """Of the media's tokens: they should know which way what they show moves, and where its centre is."""
        owner = row.item[row.visual_at]
        labels = []
        for number, (item, tokens) in enumerate(zip(order.items, order.tokens, strict=True)):
            size = int((owner == number).sum())
            side = POOLED if tokens.dim() == 3 else 2 * POOLED
            known = torch.stack(under_tokens(item.scene, side))
            labels.append(known.repeat(1, -(-size // known.shape[1]))[:, :size])
        ways, centres = torch.cat(labels, 1)
        total = torch.zeros(())
        for head, state, wanted in ((self.way, self.middle - 1, ways), (self.centre, 1, centres)):
            at = (wanted >= 0).nonzero()[:, 0]
            if len(at):
                scores = head(states[state][0, row.visual_at[at]]).float()
                rare = torch.full((scores.shape[1],), 5.0).index_fill(0, torch.tensor(0), 1.0)
                total = total + functional.cross_entropy(scores, wanted[at], rare)
        return total

    def item_loss(self, states: list[Tensor], row: Row) -> Tensor:
        inside = (row.item >= 0).nonzero()[:, 0]
        return functional.cross_entropy(self.item(states[0][0, inside]).float(), row.item[inside])

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
    guided: bool
    pruner: Pruner | None
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
    chosen = slice(frame, frame + 1)
    return Item(moment(item.scene, frame), item.content[chosen], item.saliency[chosen])


def any_pruner(rng: np.random.Generator) -> Pruner:
    name = str(rng.choice(list(PRUNERS), p=list(PRUNERS.values())))
    settings = {"seed": int(rng.integers(2**31))} if name == "random" else {}
    return make_pruner(name, float(rng.choice(KEEPS)), **settings)


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
        pools = Pools(self.seed, phase.supplies, self.model, self.workers)
        saved = time.monotonic()
        rows: dict[str, list[float]] = {}
        while step < phase.steps:
            pools.advance(step)
            rng = np.random.default_rng([self.seed, 5, len(phase.name), step])
            rate = schedule(step, phase.steps, 1.0, warmup=40, floor=phase.floor)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["peak"]
            for losses in self._step(phase, pools, rng, optimiser):
                for kind, loss in losses.items():
                    rows.setdefault(kind, []).append(loss)
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
        for frozen in (inner.vision_tower, inner.multi_modal_projector):
            frozen.requires_grad_(False)
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
                reduced = not carriers and rng.random() < phase.reduced.get(kind, 0.0)
                pruner = any_pruner(rng) if reduced else None
                ordered.append(Ordered(kind, items, carriers, bool(rng.random() < 0.5), pruner))
        return ordered

    def _build(self, order: Ordered, rng: np.random.Generator) -> Row:
        seen = [
            Seen(item.scene, tokens, item.saliency)
            for item, tokens in zip(order.items, order.tokens, strict=True)
        ]
        carriers, pruner = order.carriers, order.pruner
        if order.kind == "mixed" and len(seen) == 1:
            return image_row(rng, self.words, seen[0], pruner)
        if order.kind == "mixed":
            return mixed_row(rng, self.words, seen, carriers=carriers, most=3, pruner=pruner)
        if order.kind == "stream":
            return stream_row(rng, self.words, seen[0], carriers=carriers, moments=8)
        if order.kind == "still":
            return still_row(rng, self.words, seen[0], carriers=carriers)
        views = 3 if order.kind in ("varied", "long") and pruner is None else 1
        most = 9 if views == 1 else 7
        return video_row(rng, self.words, seen[0], carriers=carriers, views=views, most=most, pruner=pruner)

    def _step(
        self, phase: Phase, pools: Pools, rng: np.random.Generator, optimiser: torch.optim.Optimizer
    ) -> list[dict[str, float]]:
        """One update; of each row, the mean loss of its answers and those of its probes, by name."""
        optimiser.zero_grad(set_to_none=True)
        ordered = self._order(phase, pools, rng)
        for order in ordered:
            order.tokens = [item.content.view(torch.bfloat16) for item in order.items]
        rows = [self._build(order, rng) for order in ordered]
        total = sum(float(row.weights.sum()) for row in rows)
        losses: list[dict[str, float]] = []
        for first, last in _together([len(row.tokens) for row in rows]):
            losses += self._losses(ordered[first:last], rows[first:last], total, len(rows))
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return losses

    def _losses(
        self, ordered: list[Ordered], rows: list[Row], total: float, count: int
    ) -> list[dict[str, float]]:
        """Gradients of some of a step's rows; `total` weight and `count` are of all its rows."""
        inner = self.model.model
        table = inner.get_input_embeddings().weight
        heads = self.model.config.text_config.num_attention_heads
        attends = [
            RowAttention(row, heads=heads, carriers=order.carriers, guided=order.guided)
            for row, order in zip(rows, ordered, strict=True)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            embedded = [embed_row(row, table, inner.image_newline) for row in rows]
            states = row_states(inner.language_model, embedded, attends)
        logits = torch.cat(
            [of_row[-1][0, row.asked_at] for of_row, row in zip(states, rows, strict=True)]
        ).float()
        wanted = torch.cat([row.wanted for row in rows])
        answers = functional.cross_entropy(logits @ table.T, wanted, reduction="none")
        loss = torch.zeros(())
        losses = []
        parts = answers.split([len(row.wanted) for row in rows])
        for order, attend, of_row, part in zip(ordered, attends, states, parts, strict=True):
            row = attend.row
            probed = torch.zeros(())
            strayed, peeked = (
                torch.stack(seen).mean() if seen else torch.zeros(())
                for seen in (attend.strays, attend.peeks)
            )
            with torch.autocast("cpu", torch.bfloat16):
                named = self.probe.name_loss(of_row, row)
                summed = self.probe.summary_loss(of_row, row, order.items)
                painted = torch.zeros(())
                if not order.carriers and order.pruner is None:
                    painted = self.probe.token_loss(of_row, row, order)
                if order.kind == "mixed":
                    probed = self.probe.item_loss(of_row, row)
                elif order.carriers:  # elsewhere a frame's last token is one of many
                    probed = self.probe.loss(of_row, row, frame_labels(order.items[0].scene))
            right = (part * row.weights).sum()
            loss = (
                loss
                + right / total
                + (0.5 * named + 0.8 * probed + 0.3 * summed + strayed + 0.5 * (peeked + painted)) / count
            )
            name = order.kind + ("+" if order.carriers else "" if order.pruner is None else "-")
            mean = float(right.detach() / row.weights.sum())
            losses.append(
                {
                    name: mean,
                    f"{name} probe": float(probed.detach()),
                    f"{name} name": float(named.detach()),
                    f"{name} summary": float(summed.detach()),
                    f"{name} stray": float(strayed.detach()),
                    f"{name} peek": float(peeked.detach()),
                    f"{name} token": float(painted.detach()),
                }
            )
        loss.backward()
        return losses

    def log(self, phase: str, step: int, **values: float) -> None:
        row = {"phase": phase, "step": step, "seconds": round(time.monotonic() - self.started, 1), **values}
        with (self.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def save(self, folder: Path) -> None:
        save_checkpoint(self.model, self.tokenizer, folder)
