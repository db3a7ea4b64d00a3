"""Marks an answer right or wrong: exact match after normalising, or the letter of a choice.

Knows nothing about files, models or rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_ARTICLES = frozenset(("a", "an", "the"))
# a full stop or comma between digits belongs to the number
_PUNCTUATION = re.compile(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)|[^\w\s.,](?=\d)")
_LABEL = re.compile(r"\s*\(?([A-Z])[.):]\s+(?=\S)")
_LETTER_ALONE = re.compile(r"\W*([A-Z])\W*")
_LETTER_FIRST = re.compile(r"\W*([A-Z])(?:[.):]|\s*-)(?:\s|$)")
_LETTER_NAMED = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is|\s*:)?(?:\s+(?:option|choice))?[\s:]*\(?([A-Z])(?![\w'])",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """Lower case without punctuation and articles; single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = _PUNCTUATION.sub(" ", folded).split()
    kept = [word for word in words if word not in _ARTICLES]
    # "a" alone is an answer, not an article
    return " ".join(kept or words)


def is_correct(given: str, expected: str, options: Sequence[str] = ()) -> bool:
    """Whether `given` says what `expected` says; with options, both may be a letter or an option's text."""
    if not options:
        return normalise(given) == normalise(expected)
    return chosen(given, options) == chosen(expected, options) is not None


def chosen(given: str, options: Sequence[str]) -> int | None:
    """Index of the option an answer picks, None when it picks none or several."""
    texts = [normalise(option) for option in options]
    said = normalise(given)
    if texts.count(said) == 1:
        return texts.index(said)
    for pattern in (_LETTER_ALONE.fullmatch, _LETTER_FIRST.match, _LETTER_NAMED.search):
        if (found := pattern(given)) and (index := LETTERS.find(found[1].upper())) < len(options):
            return index
    # "B red circle": a letter without punctuation counts when its option's text follows
    first, _, rest = given.strip().partition(" ")
    if (
        len(first) == 1
        and (index := LETTERS.find(first)) in range(len(options))
        and texts[index] == normalise(rest)
    ):
        return index
    return _mentioned(said, texts)


def _mentioned(said: str, texts: Sequence[str]) -> int | None:
    """The one option whose text occurs in the answer; an option inside a longer one does not count."""
    found = [index for index, text in enumerate(texts) if text and f" {text} " in f" {said} "]
    longest = [i for i in found if not any(texts[i] in texts[j] and texts[i] != texts[j] for j in found)]
    return longest[0] if len(longest) == 1 else None


def without_labels(options: Sequence[str]) -> tuple[str, ...]:
    """Options without the letters some data sets write before them ("A. red" becomes "red")."""
    labels = [_LABEL.match(option) for option in options]
    if all(label and label[1] == LETTERS[index] for index, label in enumerate(labels)):
        return tuple(option[label.end() :] for option, label in zip(options, labels, strict=True) if label)
    return tuple(options)


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The question with its options listed under letters."""
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *listed, "Answer with the letter of the correct option."])
