"""First phase of `tiny`: the vision tower learns what lies under every token.

The word embeddings themselves are the classifier, so that the language model starts from tokens that
already mean words. Knows nothing about questions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaOnevisionForConditionalGeneration

from mmserve.evaluation.drawing import COLOURS
from mmserve.evaluation.tiny_data import LOOKS, Labels, batches, clip_pool, pixels, token_labels
from mmserve.evaluation.tiny_model import POOLED
from mmserve.evaluation.tiny_pools import embed_frames
from mmserve.evaluation.train_steps import schedule, update

HELD_OUT = 10**9  # first index of the clips that are only looked at
Log = Callable[..., None]


@torch.no_grad()
def share_embeddings_of_words(model: LlavaOnevisionForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Spellings of a word ("star", " star", "Star") start from one vector of unit length."""
    table = model.get_input_embeddings().weight
    nn.init.normal_(table, std=table.shape[1] ** -0.5)
    by_word: dict[str, int] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.lstrip("\u0120").lower()
        table[index] = table[by_word.setdefault(word, index)]


def token_colours(frames: Tensor) -> Tensor:
    """Mean colours of the four quarters under each pooled token, [F, 36, 12]: red first, row by row."""
    cells = functional.adaptive_avg_pool2d(frames, 2 * POOLED).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    colours: Tensor = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return colours


class TowerTask(nn.Module):
    """Classifies tokens by the words for their colour and look, and says where they are.

    Place and paint are for what compares frames: which way things move, and whether the scene is cut.
    """

    colours: Tensor
    looks: Tensor

    def __init__(self, model: LlavaOnevisionForConditionalGeneration, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        table = model.get_input_embeddings().weight.detach()
        width = table.shape[1]
        for name, words in (("colours", tuple(COLOURS)), ("looks", LOOKS)):
            self.register_buffer(name, table[[tokenizer.token_to_id(word) for word in words]].clone())
        self.offset, self.place = nn.Linear(width, 2), nn.Linear(width, POOLED**2)
        self.paint = nn.Linear(width, 12)  # colours of a token's quarters, background included
        self.nothing = nn.Parameter(torch.zeros(2, width))
        self.scale = nn.Parameter(torch.tensor(8.0))

    def trained(self) -> list[nn.Parameter]:
        inner = self.model.model
        modules = (inner.vision_tower, inner.multi_modal_projector, self.offset, self.place, self.paint)
        return [parameter for module in modules for parameter in module.parameters()] + [
            self.nothing,
            self.scale,
        ]

    def loss(self, frames: NDArray[np.uint8], truth: Labels) -> tuple[Tensor, dict[str, float]]:
        device = self.nothing.device
        shown = pixels(frames).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            tokens = embed_frames(self.model, shown, pooled=True)
        tokens = tokens.float()
        loss, scores = tokens.square().sum(-1).mean() * 0.01, {}
        for name, words, none, label in (
            ("colour", self.colours, self.nothing[0], truth.colour),
            ("look", self.looks, self.nothing[1], truth.look),
        ):
            logits = (tokens @ torch.cat([words, none[None]]).T) * self.scale
            label = label.to(device)
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), label.flatten())
            inside = label < len(words)
            scores[name] = (logits.argmax(-1) == label)[inside].float().mean().item()
        inside = truth.look.to(device) < len(LOOKS)
        error = self.offset(tokens)[inside] - truth.offset.to(device)[inside]
        place = torch.arange(POOLED**2, device=device).expand(len(frames), -1).flatten()
        found = functional.cross_entropy(self.place(tokens).flatten(0, 1), place)
        painted = (self.paint(tokens) - token_colours(shown)).square().mean()
        return loss + error.square().mean() + 0.6 * found + painted, scores


def train_tower(task: TowerTask, *, seed: int, steps: int, clips: int, workers: int, log: Log) -> None:
    pool = clip_pool(seed, 0, clips, 8, workers)
    held = clip_pool(seed, HELD_OUT, 32, 8, workers)
    frames = np.concatenate([clip for _, clip in pool])
    truth = token_labels([scene for scene, _ in pool])
    sample, sample_truth = np.concatenate([clip for _, clip in held]), token_labels([s for s, _ in held])
    del pool
    optimiser = torch.optim.AdamW(task.trained(), weight_decay=0.02)
    rng = np.random.default_rng([seed, 1])
    step = 0
    while step < steps:
        for chosen in batches(len(frames), 128, rng):
            loss, _ = task.loss(frames[chosen], Labels(*(t[chosen] for t in truth)))
            update(optimiser, loss, schedule(step, steps, 1.5e-3, warmup=100))
            if step % 100 == 0:
                with torch.no_grad():
                    _, scores = task.loss(sample, sample_truth)
                log("tower", step, loss=loss.item(), **scores)
            step += 1
            if step >= steps:
                break
