"""Train the embedded model `tiny`: `python -m mmserve.evaluation.train_tiny --out RUN`.

Two phases, each resumable from RUN/*.safetensors: the tower learns what lies under every token, aligned
with the word embeddings; then the language model learns to answer, many questions to a clip, on
embeddings computed once. Reproducible from the seed; longer clips, several media and carriers would be
further phases with other clips and masks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmserve.evaluation.checkpoint import load_state, save_state
from mmserve.evaluation.clipworld import Scene
from mmserve.evaluation.drawing import COLOURS
from mmserve.evaluation.tiny_data import (
    LOOKS,
    Labels,
    Packed,
    Packer,
    batches,
    clip_pool,
    pixels,
    token_labels,
    training_questions,
)
from mmserve.evaluation.tiny_model import build_config, build_model, build_tokenizer, save_checkpoint

HELD_OUT = 10**9  # first clip index of the recipe's own validation clips


class Trainer:
    """Model, tokenizer and run directory; one method per phase."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.run = Path(arguments.out)
        self.run.mkdir(parents=True, exist_ok=True)
        self.seed: int = arguments.seed
        self.device = torch.device(arguments.device)
        self.tokenizer = build_tokenizer()
        config = build_config(self.tokenizer)
        self.model = build_model(config, self.seed).to(self.device)
        self.packer = Packer(self.tokenizer, config.video_token_id)
        self.workers: int = arguments.workers
        self._share_embeddings_of_words()

    @torch.no_grad()
    def _share_embeddings_of_words(self) -> None:
        """Spellings of a word ("star", " star", "Star") start from one vector of unit length."""
        table = self.model.get_input_embeddings().weight
        nn.init.normal_(table, std=table.shape[1] ** -0.5)
        by_word: dict[str, int] = {}
        for token, index in sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1]):
            word = token.lstrip("Ġ").lower()
            table[index] = table[by_word.setdefault(word, index)]

    def words(self, names: tuple[str, ...]) -> Tensor:
        ids = [self.tokenizer.token_to_id(name) for name in names]
        table: Tensor = self.model.get_input_embeddings().weight
        return table[ids].detach()

    def embed(self, frames: Tensor) -> Tensor:
        """Pixels [F, 3, H, W] to pooled, projected tokens [F, 36, D]."""
        inner = self.model.model
        features = inner.vision_tower(frames, output_hidden_states=True).hidden_states[-1]
        pooled: Tensor = inner.apply_pooling(inner.multi_modal_projector(features))
        return pooled

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    # phase 1

    def train_tower(self, steps: int, clips: int, batch: int) -> None:
        """Per-token classification with the word embeddings themselves as the classifier."""
        state = self.run / "tower.safetensors"
        if state.exists():
            load_state(state, self.model, None)
            return
        pool = clip_pool(self.seed, 0, clips, 8, "see", self.workers)
        held = clip_pool(self.seed, HELD_OUT, 32, 8, "see", self.workers)
        frames = np.concatenate([clip for _, clip in pool])
        truth = token_labels([scene for scene, _ in pool])
        del pool
        colours, looks = self.words(tuple(COLOURS)), self.words(LOOKS)
        heads = nn.ModuleDict({"offset": nn.Linear(256, 2), "place": nn.Linear(256, 36)}).to(self.device)
        nothing = nn.Parameter(torch.zeros(2, 256, device=self.device))
        scale = nn.Parameter(torch.tensor(8.0, device=self.device))
        trained = [
            *self.model.model.vision_tower.parameters(),
            *self.model.model.multi_modal_projector.parameters(),
        ]
        optimiser = torch.optim.AdamW([*trained, *heads.parameters(), nothing, scale], weight_decay=0.02)
        classifiers = (colours, looks, nothing, scale, heads)
        rng = np.random.default_rng([self.seed, 1])
        started, step = time.monotonic(), 0
        while step < steps:
            for chosen in batches(len(frames), batch, rng):
                rate = _schedule(step, steps, 1.5e-3, warmup=100)
                loss, _ = self._tower_loss(frames[chosen], Labels(*(t[chosen] for t in truth)), classifiers)
                _update(optimiser, loss, rate)
                if step % 100 == 0:
                    sample = np.concatenate([clip for _, clip in held])
                    with torch.no_grad():
                        _, scores = self._tower_loss(
                            sample, token_labels([scene for scene, _ in held]), classifiers
                        )
                    self._log("tower", step, started, loss=loss.item(), **scores)
                step += 1
                if step >= steps:
                    break
        save_state(state, self.model, None, steps)

    def _tower_loss(
        self,
        frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        truth: Labels,
        classifiers: tuple[Tensor, Tensor, Tensor, Tensor, nn.ModuleDict],
    ) -> tuple[Tensor, dict[str, float]]:
        colours, looks, nothing, scale, heads = classifiers
        with self.autocast():
            tokens = self.embed(pixels(frames).to(self.device))
        tokens = tokens.float()
        loss, scores = tokens.square().sum(-1).mean() * 0.01, {}
        for name, words, none, label in (
            ("colour", colours, nothing[0], truth.colour),
            ("look", looks, nothing[1], truth.look),
        ):
            logits = (tokens @ torch.cat([words, none[None]]).T) * scale
            label = label.to(self.device)
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), label.flatten())
            inside = label < len(words)
            scores[name] = (logits.argmax(-1) == label)[inside].float().mean().item()
        inside = truth.look.to(self.device) < len(LOOKS)
        error = heads["offset"](tokens)[inside] - truth.offset.to(self.device)[inside]
        place = torch.arange(36, device=self.device).expand(len(frames), 36).flatten()
        loss = (
            loss
            + error.square().mean()
            + 0.2 * functional.cross_entropy(heads["place"](tokens).flatten(0, 1), place)
        )
        return loss, scores

    # phase 2

    @torch.no_grad()
    def _embeddings(self, count: int, start: int, frames: int) -> tuple[list[Scene], Tensor]:
        pool = clip_pool(self.seed, start, count, frames, "answer", self.workers)
        rows = []
        for first in range(0, count, 16):
            clip = np.concatenate([clip for _, clip in pool[first : first + 16]])
            with self.autocast():
                rows.append(self.embed(pixels(clip).to(self.device)).bfloat16())
        return [scene for scene, _ in pool], torch.cat(rows).view(count, frames * 36, -1)

    def train_language(self, steps: int, shard: int, passes: int, batch: int, most: int, frames: int) -> None:
        """Answer loss on fresh shards of clips whose embeddings are computed once and used `passes` times."""
        state = self.run / "language.safetensors"
        language = [*self.model.model.language_model.parameters(), self.model.model.image_newline]
        optimiser = torch.optim.AdamW(_decayed(language), betas=(0.9, 0.98))
        step = 0
        if state.exists():
            step = load_state(state, self.model, optimiser)
        held_scenes, held = self._embeddings(256, HELD_OUT, frames)
        started = time.monotonic()
        while step < steps:
            scenes, visual = self._embeddings(shard, step * batch, frames)
            for turn in range(passes):
                rng = np.random.default_rng([self.seed, 2, step, turn])
                for chosen in batches(shard, batch, rng):
                    asked = [training_questions(rng, scenes[index], most) for index in chosen]
                    packed = self.packer.pack(visual.shape[1] + 1, asked)
                    losses, _ = self._answer_losses(visual[chosen], packed)
                    weights = packed.weights[packed.targets >= 0].to(self.device)
                    loss = (losses * weights).sum() / weights.sum()
                    _update(optimiser, loss, _schedule(step, steps, 1e-3, warmup=150))
                    if step % 50 == 0:
                        self._log("language", step, started, loss=loss.item())
                    step += 1
                    if step % 250 == 0:
                        scores = self.score(held_scenes, held, batch)
                        self._log("language", step, started, **scores)
                    if step >= steps:
                        break
            save_state(state, self.model, optimiser, step)

    def _answer_losses(self, visual: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Cross entropy and arg-max of every asked token, [targets]."""
        inner = self.model.model
        tokens = packed.tokens.to(self.device)
        with self.autocast():
            embedded = inner.get_input_embeddings()(tokens)
            newline = inner.image_newline.expand(len(visual), 1, -1)
            start = len(self.packer.prefix)
            media = torch.cat([visual.to(self.device, embedded.dtype), newline.to(embedded.dtype)], 1)
            embedded = torch.cat([embedded[:, :start], media, embedded[:, start + media.shape[1] :]], 1)
            hidden = inner.language_model(
                inputs_embeds=embedded,
                attention_mask=packed.mask.to(self.device),
                position_ids=packed.positions.to(self.device),
                use_cache=False,
            ).last_hidden_state
        asked = packed.targets >= 0
        logits = hidden[asked.to(self.device)].float() @ inner.get_input_embeddings().weight.float().T
        targets = packed.targets[asked].to(self.device)
        return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)

    @torch.no_grad()
    def score(self, scenes: list[Scene], visual: Tensor, batch: int) -> dict[str, float]:
        """Exact-match accuracy per question kind on held-out clips (teacher forced, so equal to greedy)."""
        rng = np.random.default_rng([self.seed, 3])
        right: dict[str, list[bool]] = defaultdict(list)
        for first in range(0, len(scenes), batch):
            part = scenes[first : first + batch]
            packed = self.packer.pack(
                visual.shape[1] + 1, [training_questions(rng, scene, 12) for scene in part]
            )
            _, guesses = self._answer_losses(visual[first : first + batch], packed)
            asked = packed.targets >= 0
            correct = torch.ones_like(asked)
            correct[asked] = guesses.cpu() == packed.targets[asked]
            for row, kinds in enumerate(packed.kinds):
                for kind, begin, end in kinds:
                    right[kind].append(bool(correct[row, begin:end].all()))
        scores = {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}
        return scores | {"mean": round(sum(scores.values()) / len(scores), 3)}

    def _log(self, phase: str, step: int, started: float, **values: float) -> None:
        row = {"phase": phase, "step": step, "seconds": round(time.monotonic() - started, 1), **values}
        with (self.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def save(self, folder: Path) -> None:
        save_checkpoint(self.model.cpu(), self.tokenizer, folder)


def _schedule(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))))


def _decayed(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    """Weight decay for matrices only."""
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _update(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/tiny", help="run directory: checkpoints, log, result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render clips")
    parser.add_argument("--tower-steps", type=int, default=900)
    parser.add_argument("--language-steps", type=int, default=2000)
    parser.add_argument("--frames", type=int, default=8)
    arguments = parser.parse_args()
    trainer = Trainer(arguments)
    trainer.train_tower(arguments.tower_steps, clips=4096, batch=128)
    trainer.train_language(
        arguments.language_steps, shard=2048, passes=6, batch=16, most=8, frames=arguments.frames
    )
    trainer.save(trainer.run / "checkpoint")


if __name__ == "__main__":
    main()
