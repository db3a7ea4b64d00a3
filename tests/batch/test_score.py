"""Marking: normalised exact match, letters and texts of options."""

from __future__ import annotations

import pytest

from mmserve.batch.score import choice_prompt, chosen, is_correct, normalise, without_labels

OPTIONS = ("a red circle", "blue", "a blue circle", "none of these")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Red.", "red"),
        ("  RED ", "red"),
        ("a circle", "circle"),
        ("The circle!", "circle"),
        ("7", "7"),
        ("two  words", "two words"),
        ("“yes”", "Yes"),
        ("Straße", "STRASSE"),
        ("3.5", "3.5"),
        ("A", "a"),
        ("e-mail", "e mail"),
    ],
)
def test_spelling_case_and_articles_do_not_matter(given: str, expected: str) -> None:
    assert is_correct(given, expected)


@pytest.mark.parametrize(
    ("given", "expected"), [("red", "blue"), ("3.5", "35"), ("red circle", "red"), ("", "red")]
)
def test_other_words_are_wrong(given: str, expected: str) -> None:
    assert not is_correct(given, expected)


def test_numbers_keep_their_point() -> None:
    assert normalise("It is 1,000.5, roughly.") == "it is 1,000.5 roughly"


@pytest.mark.parametrize(
    ("given", "index"),
    [
        ("A", 0),
        ("b", 1),  # the text of no option, but see below
        ("(C)", 2),
        ("D.", 3),
        ("C. a blue circle", 2),
        ("C) whatever", 2),
        ("B blue", 1),
        ("Blue", 1),
        ("the blue circle", 2),
        ("A red circle", 0),
        ("A red circle is seen.", 0),
        ("I see the blue circle", 2),
        ("The answer is C", 2),
        ("Answer: (D)", 3),
        ("The correct option is B.", 1),
    ],
)
def test_an_option_is_chosen_by_letter_or_text(given: str, index: int) -> None:
    expected = None if given == "b" else index
    assert chosen(given, OPTIONS) == expected


@pytest.mark.parametrize("given", ["E", "", "green", "red circle or none of these", "A or B"])
def test_no_or_several_options_are_no_choice(given: str) -> None:
    assert chosen(given, OPTIONS) is None


@pytest.mark.parametrize("expected", ["C", "a blue circle", "Blue circle"])
@pytest.mark.parametrize("given", ["C", "(C)", "blue circle", "C. a blue circle"])
def test_letters_and_texts_mean_the_same(given: str, expected: str) -> None:
    assert is_correct(given, expected, OPTIONS)


def test_no_choice_is_never_right() -> None:
    assert not is_correct("?", "?", OPTIONS)


def test_an_option_that_reads_like_a_letter_is_matched_by_its_text() -> None:
    assert chosen("B", ("B", "A")) == 0


def test_labels_are_taken_off_when_every_option_has_its_own() -> None:
    assert without_labels(["A. red", "B. blue"]) == ("red", "blue")
    assert without_labels(["A. red", "blue"]) == ("A. red", "blue")
    assert without_labels(["B. red", "A. blue"]) == ("B. red", "A. blue")


def test_a_prompt_lists_options_under_letters() -> None:
    assert choice_prompt("Which?", ["x", "y"]) == (
        "Which?\nA. x\nB. y\nAnswer with the letter of the correct option."
    )
