"""Training rows of `tiny`: a context of text and media, and branches of questions behind it.

Many branches share one context: each sees as much of the context as it names and itself, never another
branch, at the positions it would have alone. The tokens are exactly those of the chat template. Knows
nothing about scenes or optimisation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from mmserve.evaluation.clipworld import DIRECTIONS, Question
from mmserve.evaluation.drawing import COLOURS, SHAPES
from mmserve.pruning.base import Modality, Pruner, VisualItem
from mmserve.pruning.carriers import carrier_slots, with_carriers

SOUGHT = (*COLOURS, *SHAPES, *DIRECTIONS)
NAMED_BY = {"colour": SHAPES, "direction": SHAPES, "shape": tuple(COLOURS)}  # by kind of question
ABOUT_ITEM = re.compile(r"In item (\d+)")
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One context of C tokens followed by Q tokens of branches, S = C + Q."""

    tokens: Tensor  # int64 [S]
    positions: Tensor  # int64 [S]
    frame: Tensor  # int64 [C], the frame each token belongs to, -1 for text and images
    item: Tensor  # int64 [C], the number of the media item each token belongs to, -1 for text
    branch: Tensor  # int64 [Q]
    sees: Tensor  # int64 [Q], how many tokens of the context are visible
    visual: Tensor  # [V, D] embeddings
    visual_at: Tensor  # int64 [V]
    newline_at: Tensor  # int64 [N]
    asked_at: Tensor  # int64 [A], the tokens after which an answer's token is wanted
    wanted: Tensor  # int64 [A]
    weights: Tensor  # float32 [A]
    kinds: list[tuple[str, int, int]]  # (kind, first, last + 1) in the asked
    named_at: Tensor  # int64 [M], the words in questions by which an object is named
    sought: Tensor  # int64 [M], the index in SOUGHT of what is asked about it
    gated_at: Tensor  # int64 [G], the tokens of branches that ask about one item by its number
    gated_item: Tensor  # int64 [G], that item's number
    ended: list[tuple[int, int, int]]  # (newline's token, item, frames of it before) of what was shown


class TinyTokenizer:
    """Ids of text with special tokens, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.media = {kind: self.ids(f"<{kind}>")[0] for kind in ("image", "video")}

    def name_at(self, question: Question, ids: list[int]) -> int | None:
        """Where in `ids`, which hold a question, the one object it is about is named."""
        names = {token for word in NAMED_BY.get(question.kind, ()) for token in self.ids(f" {word}")}
        found = [index for index, token in enumerate(ids) if token in names]
        return found[0] if len(found) == 1 and question.answer in SOUGHT else None

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = list(self._tokenizer.encode(text).ids)
        return self._known[text]


@dataclass(slots=True)
class RowBuilder:
    """Collects one row. With `carriers`, the frames of videos carry their means.

    With a `pruner`, media are what it leaves of them, each token where it stood in the whole prompt. What
    it leaves depends on all frames, so that no branch may then see a video in part.
    """

    tokenizer: TinyTokenizer
    carriers: bool
    pruner: Pruner | None = None
    _tokens: list[int] = field(default_factory=list)
    _positions: list[int] = field(default_factory=list)
    _frame: list[int] = field(default_factory=list)
    _item: list[int] = field(default_factory=list)
    _visual: list[Tensor] = field(default_factory=list)
    _visual_at: list[int] = field(default_factory=list)
    _newline_at: list[int] = field(default_factory=list)
    _branch: list[int] = field(default_factory=list)
    _sees: list[int] = field(default_factory=list)
    _asked: list[tuple[int, int, float]] = field(default_factory=list)
    _kinds: list[tuple[str, int, int]] = field(default_factory=list)
    _named: list[tuple[int, int]] = field(default_factory=list)
    _gated: list[tuple[int, int]] = field(default_factory=list)
    _ended: list[tuple[int, int, int]] = field(default_factory=list)
    _next: int = 0  # position of the context's next token
    _items: int = 0
    _frames: int = 0
    _branches: int = 0

    def text(self, text: str) -> None:
        self._extend(self.tokenizer.ids(text), -1)

    def video(
        self,
        frames: Tensor,
        *,
        newline: bool,
        gap_before: int = -1,
        gap: int = 0,
        saliency: Tensor | None = None,
    ) -> None:
        """Frames [T, N, D], with a pruner also their saliency; positions leap by `gap` before `gap_before`.

        Without `newline` every branch brings its own, so that branches can see different lengths.
        """
        count, size = frames.shape[:2]
        left, source = self._left("video", with_carriers(frames) if self.carriers else frames, saliency)
        frame = source // size
        self._visual.append(left)
        self._visual_at += range(len(self._tokens), len(self._tokens) + len(source))
        self._place("video", source + gap * (frame >= gap_before), frame + self._frames)
        self._next += count * size + gap
        self._frames += count
        if newline:
            self._ended.append((len(self._tokens), self._items, count))
            self._newline_at.append(len(self._tokens))
            self._extend([self.tokenizer.media["video"]], self._items)
        self._items += 1

    def image(self, crop: Tensor, *, alone: bool, saliency: Tensor | None = None) -> None:
        """Tokens [N, D] of one crop; an image alone in its prompt is followed by itself as a tile."""
        cells = _image_cells(len(crop), alone=alone)
        shown = None if saliency is None else saliency[cells][None]
        left, source = self._left("image", crop[cells][None], shown, (cells < 0)[None])
        at, is_line = torch.arange(len(source)) + len(self._tokens), cells[source] < 0
        lines = at[is_line].tolist()
        self._visual.append(left[~is_line])
        self._visual_at += at[~is_line].tolist()
        self._newline_at += lines
        self._ended += [(line, self._items, 1) for line in lines]
        self._place("image", source, torch.full_like(source, -1))
        self._next += len(cells)
        self._items += 1

    def branch(self, turns: Sequence[Question], frames: int | None = None) -> None:
        """A dialogue of one or more questions.

        With `frames` it sees the context up to that frame and brings the video's newline.
        """
        if frames is None:
            sees = len(self._frame)
        else:
            sees = self._frame.index(frames) if frames < self._frames else len(self._frame)
        start = len(self._tokens)
        if frames is not None:
            self._ended.append((len(self._tokens), self._items - 1, frames))
            self._newline_at.append(len(self._tokens))
            self._tokens.append(self.tokenizer.media["video"])
        for number, question in enumerate(turns):
            opening = "<|im_start|>user\n" if number else ""
            prompt = self.tokenizer.ids(f"\n{opening}{question.text}{ASSISTANT}")
            name = self.tokenizer.name_at(question, prompt)
            if name is not None:
                self._named.append((len(self._tokens) + name, SOUGHT.index(question.answer)))
            about = ABOUT_ITEM.match(question.text)
            gate = len(self._tokens) + len(self.tokenizer.ids(f"\n{opening}{about[0]}")) if about else 0
            self._tokens += prompt
            answer = self.tokenizer.ids(f"{question.answer}<|im_end|>")
            weight = 1.0 / len(answer) if question.kind == "caption" else 1.0
            self._kinds.append((question.kind, len(self._asked), len(self._asked) + len(answer)))
            first = len(self._tokens) - 1
            self._asked += [(first + step, token, weight) for step, token in enumerate(answer)]
            self._tokens += answer
            if about:
                self._gated += [(at, int(about[1]) - 1) for at in range(gate, len(self._tokens) - 1)]
        added = len(self._tokens) - start
        after = self._next if sees == len(self._frame) else self._positions[sees - 1] + 1
        self._positions += range(after, after + added)
        self._branch += [self._branches] * added
        self._sees += [sees] * added
        self._branches += 1

    def row(self) -> Row:
        at, wanted, weights = zip(*self._asked, strict=True)
        return Row(
            tokens=torch.tensor(self._tokens),
            positions=torch.tensor(self._positions),
            frame=torch.tensor(self._frame),
            item=torch.tensor(self._item),
            branch=torch.tensor(self._branch),
            sees=torch.tensor(self._sees),
            visual=torch.cat(self._visual),
            visual_at=torch.tensor(self._visual_at),
            newline_at=torch.tensor(self._newline_at),
            asked_at=torch.tensor(at),
            wanted=torch.tensor(wanted),
            weights=torch.tensor(weights),
            kinds=self._kinds,
            named_at=torch.tensor([at for at, _ in self._named], dtype=torch.long),
            sought=torch.tensor([wanted for _, wanted in self._named], dtype=torch.long),
            gated_at=torch.tensor([at for at, _ in self._gated], dtype=torch.long),
            gated_item=torch.tensor([item for _, item in self._gated], dtype=torch.long),
            ended=self._ended,
        )

    def _left(
        self, modality: Modality, tokens: Tensor, saliency: Tensor | None, is_line: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is left of tokens [T, N, D], and where in them it stood; newlines always stay."""
        if self.pruner is None:
            whole = tokens.flatten(0, 1)
            return whole, torch.arange(len(whole))
        assert saliency is not None, "a method may ask for it"
        item = VisualItem(embeddings=tokens, saliency=saliency, protect=is_line, modality=modality)
        left = self.pruner.reduce(item)
        return left.embeddings, left.source

    def _place(self, modality: Modality, places: Tensor, frame: Tensor) -> None:
        """Tokens of the current item at `places` counted from the next position."""
        self._tokens += [self.tokenizer.media[modality]] * len(places)
        self._positions += (places + self._next).tolist()
        self._frame += frame.tolist()
        self._item += [self._items] * len(places)

    def _extend(self, ids: list[int], item: int) -> None:
        self._tokens += ids
        self._positions += range(self._next, self._next + len(ids))
        self._next += len(ids)
        self._frame += [-1] * len(ids)
        self._item += [item] * len(ids)


def _image_cells(size: int, *, alone: bool) -> Tensor:
    """Which of a crop's `size` tokens stand one after the other in the prompt; -1 is a newline."""
    cells = torch.arange(size)
    if not alone:
        return functional.pad(cells, (0, 1), value=-1)
    side = round(size**0.5)
    return torch.cat([cells, functional.pad(cells.view(side, side), (0, 1), value=-1).flatten()])


def frame_ends(row: Row) -> Tensor:
    """Index of each frame's last token, its carrier slot, int64 [frames]."""
    return carrier_slots(row.frame).nonzero()[:, 0]
