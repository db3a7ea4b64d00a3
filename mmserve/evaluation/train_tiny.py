"""Train the embedded model and its draft: `python -m mmserve.evaluation.train_tiny --out RUN`.

Every phase is resumable from RUN/*.safetensors: the tower learns what lies under every token; the
language model learns to answer on 8-frame clips; then long, mixed and streamed prompts. The draft takes
the same way, shorter. Reproducible from the seed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from mmserve.evaluation.checkpoint import load_state, save_state
from mmserve.evaluation.tiny_model import DRAFT, TINY, Geometry, build_config, build_model, build_tokenizer
from mmserve.evaluation.tiny_score import accuracies
from mmserve.evaluation.train_curriculum import Curriculum
from mmserve.evaluation.train_phases import DRAFT_PHASES, TINY_PHASES, Phase
from mmserve.evaluation.train_tower import TowerTask, share_embeddings_of_words, train_tower

VALIDATION_SEED = 9  # of the suites, for the log alone; the model card has another


def train(
    run: Path, geometry: Geometry, phases: tuple[Phase, ...], *, seed: int, tower_steps: int, workers: int
) -> None:
    """All phases of one model; its checkpoint is RUN/checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer, geometry), seed)
    share_embeddings_of_words(model, tokenizer)
    curriculum = Curriculum(model, tokenizer, run, seed, workers)
    tower = run / "tower.safetensors"
    if tower.exists():
        load_state(tower, model, None)
    else:
        task = TowerTask(model, tokenizer)
        train_tower(task, seed=seed, steps=tower_steps, clips=4096, workers=workers, log=curriculum.log)
        save_state(tower, model, None, tower_steps)
    for phase in phases:
        curriculum.train(phase)
        scores = accuracies(model, curriculum.words, seed=VALIDATION_SEED, limit=96)
        curriculum.log(phase.name, phase.steps, **scores)
    curriculum.save(run / "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs", help="run directory: checkpoints, logs, results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make clips")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the training itself")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run, workers = Path(arguments.out), arguments.workers
    train(run / "tiny", TINY, TINY_PHASES, seed=arguments.seed, tower_steps=900, workers=workers)
    train(run / "draft", DRAFT, DRAFT_PHASES, seed=arguments.seed, tower_steps=900, workers=workers)


if __name__ == "__main__":
    main()
