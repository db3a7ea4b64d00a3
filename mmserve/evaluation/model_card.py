"""Writes the model card of `tiny` from measurements: `python -m mmserve.evaluation.model_card`.

Accuracy is that of transformers' own greedy generation on held-out questions, so it judges the
weights and not this server.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from mmserve.evaluation.clipworld import CRF
from mmserve.evaluation.oracle import TransformersOracle, accuracy_by_kind
from mmserve.evaluation.suites import examples
from mmserve.models.resolve import resolve

INTRODUCTION = """---
license: apache-2.0
pipeline_tag: video-text-to-text
---
# tiny

The embedded model of mmserve: a LLaVA-OneVision checkpoint of 5.8 million parameters in bf16, for tests
and demonstrations. It answers short questions about ClipWorld's generated clips, and nothing else.

| part | geometry |
|---|---|
| vision tower | SigLIP, 144 x 144, patch 12, 4 layers of width 160, 4 heads |
| tokens | 144 per image crop, 36 per video frame after pooling, one newline per video |
| language model | Qwen2, 6 layers of width 256, 4 heads, 2 KV heads, head size 64, tied embeddings |
| tokenizer | byte-level BPE, 1,024 entries, ClipWorld's words and single digits whole |

## Accuracy

transformers' own greedy generation in fp32 on held-out questions (`clipworld-basic`, suite seed {seed},
H.264 at quality {crf}); training draws from another random stream.

| kind | right | asked | accuracy |
|---|---|---|---|
"""

RECIPE = """
## Training

`python -m mmserve.evaluation.train_tiny` from seeds: the tower and projector first learn what lies under
every token, with the word embeddings as the classifier; then the language model learns to answer, eight
questions packed behind one clip whose embeddings are computed once.
Half of its heads start as "find what resembles me and copy it", without which binding a colour to a
shape stays on a plateau.

{history}
## Limits

8-frame clips of 144 x 144 pixels are what it knows. Longer videos, several media in one prompt, images,
turns of a dialogue and streams are outside its training so far. It must not be used for anything real.
"""


def write_card(path: Path, limit: int, seed: int, history: str) -> float:
    """Measure, write README.md beside the weights, and return the accuracy."""
    scores = accuracy_by_kind(TransformersOracle(path), islice(examples("clipworld-basic", seed), limit))
    right = sum(hits for hits, _ in scores.values())
    asked = sum(count for _, count in scores.values())
    rows = [f"| {kind} | {hits} | {count} | {hits / count:.1%} |" for kind, (hits, count) in scores.items()]
    rows.append(f"| **all** | {right} | {asked} | **{right / asked:.1%}** |")
    introduction = INTRODUCTION.format(seed=seed, crf=CRF)
    (path / "README.md").write_text(introduction + "\n".join(rows) + "\n" + RECIPE.format(history=history))
    return right / asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="checkpoint directory")
    parser.add_argument("--limit", type=int, default=800, help="questions")
    parser.add_argument("--seed", type=int, default=1, help="suite seed")
    parser.add_argument("--history", default="", help="a paragraph on how these weights came about")
    arguments = parser.parse_args()
    history = f"{arguments.history}\n" if arguments.history else ""
    write_card(resolve(arguments.model), arguments.limit, arguments.seed, history)


if __name__ == "__main__":
    main()
