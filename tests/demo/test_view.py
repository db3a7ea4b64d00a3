"""What the page shows: nothing of a model or a server becomes markup."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from demo import view

ATTACK = '<img src=x onerror="alert(1)">&'
ESCAPED = "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;"


def report(**usage: int) -> dict[str, Any]:
    times = dict.fromkeys([*view.STAGES, "ttft", "generate", "total"], 0.0)
    times |= {"encode": 60.0, "prefill": 20.0, "ttft": 80.0, "generate": 20.0, "total": 100.0}
    names = ("visual_tokens", "visual_tokens_kept", "visual_tokens_cached", "completion_tokens")
    counts = dict.fromkeys([*names, "kv_bytes", "kv_bytes_uncompressed"], 0) | usage
    return {
        "timings_ms": times,
        "usage": counts,
        "media": [{"frames": 16}],
        "methods": {"prune": "none", "kv": "none"},
    }


@pytest.mark.parametrize(
    "shown",
    [
        view.running_answer(ATTACK),
        view.finished_answer(ATTACK),
        view.failed_answer(ATTACK),
        view.failed_answer("x", ATTACK),
        view.header(True, ATTACK),
    ],
)
def test_foreign_text_is_escaped(shown: str) -> None:
    assert ESCAPED in shown
    assert "<img" not in shown


def test_the_report_shows_tokens_and_shares() -> None:
    shown = view.report(
        report(visual_tokens=200, visual_tokens_kept=50, visual_tokens_cached=100, completion_tokens=3)
    )
    for words in ("200 → 50", "25% kept, 100 from cache", "100 per second", "16", "80 ms"):
        assert words in shown
    assert "width:60.000%" in shown
    # what took no time has no part of the bar, but a line below it
    assert shown.count("width:") == 3
    assert shown.count("<li>") == len(view.STAGES) + 1


def test_a_report_without_media_or_tokens_is_fine() -> None:
    empty = report() | {"media": []}
    empty["timings_ms"] = dict.fromkeys(empty["timings_ms"], 0.0)
    assert "no picture" in view.report(empty)


def test_an_empty_answer_says_so() -> None:
    assert "nothing to say" in view.finished_answer("")
    assert "Stopped." in view.finished_answer("", "Stopped.")


def test_the_page_is_a_client_on_loopback() -> None:
    """R19: it loads no other app, is not shared, and listens on this host only."""
    tree = ast.parse((Path(view.__file__).parent / "page.py").read_text("utf-8"))
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "gr.load" not in attributes
    (launch,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "page.launch"
    )
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in launch.keywords}
    assert given["share"] == "False"
    assert given["server_name"] == "'127.0.0.1'"
