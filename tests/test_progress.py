"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from mmserve.progress import PLAIN_S, progress_bar


def test_there_is_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with progress_bar(100, "evaluating", plain=True, clock=lambda: now) as advance:
        for _ in range(100):
            now += PLAIN_S / 10
            advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [f"evaluating {done}/100" for done in range(10, 101, 10)]


@pytest.mark.parametrize("shown", [True, False])
def test_who_does_not_ask_for_lines_gets_none(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with progress_bar(2, "answering", shown=shown, plain=not shown, clock=lambda: now) as advance:
        now += 10 * PLAIN_S
        advance()
    assert capsys.readouterr().err == ""
