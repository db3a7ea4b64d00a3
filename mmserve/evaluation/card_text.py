"""The words of the model card of `tiny`; the figures come from `model_card`."""

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

transformers' own greedy generation in fp32 on held-out questions (suite seed {seed}, H.264 at quality 18);
training draws from another random stream. "Carriers only": one mean token per frame (VideoScan's semantic
carrier, in the slot of the frame's last token) and the text are all that decoding sees. "Random 10 %": a
tenth of the visual tokens, drawn at random. "One-frame": the middle frame of each video. "Blind": no media.
"""

RECIPE = """## Training

`python -m mmserve.evaluation.train_tiny` from seeds:

1. the tower and projector learn what lies under every token, with the word embeddings as the classifier;
2. the language model learns to answer about 8-frame clips, many questions packed behind each;
3. on the frozen tower: videos of 1 to 64 frames asked at their end and after some of their frames, streams,
   prompts of up to 6 images and clips, dialogues, positions with gaps; the semantic mask on a share of rows,
   and media that HoliTom, chance or another method has reduced to 10 to 50 % on another.

A quarter of the heads start as "find what resembles me and copy it", without which binding a colour to a
shape stays on a plateau. Half of the rows are guided: their attention is masked to what it should find
by itself, and the other rows pay for looking elsewhere (a question about item 3 at item 2, anybody at
media before it can know the item). Linear probes, dropped after training, ask tokens of media which item
they belong to, which way they move and where an object's centre is, the newline after media for all that
can be asked about them, and each carrier what is in sight and what has happened.
"""

CURVES = """![Training loss of answers by kind of row](curves.svg)
"""

LIMITS = """## Limits

Clips of 144 x 144 pixels with ClipWorld's shapes, colours and questions are all it knows. It must not be
used for anything real.
"""
