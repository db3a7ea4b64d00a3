"""The bundled clips and what is suggested about them."""

from __future__ import annotations

from pathlib import Path

from demo.library import ALWAYS, MAX_SUGGESTIONS, load_clips
from demo.page import CLIPS


def test_a_folder_without_questions_still_has_clips(tmp_path: Path) -> None:
    (tmp_path / "a_walk.mp4").touch()
    (tmp_path / "notes.txt").touch()
    (clip,) = load_clips(tmp_path).values()
    assert (clip.title, clip.answers) == ("a walk", {})
    assert clip.suggestions == list(ALWAYS)
    assert load_clips(tmp_path / "nothing") == {}


def test_a_clips_own_questions_come_first(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.mp4"):
        (tmp_path / name).touch()
    rows = [f'{{"video": "b.mp4", "question": "Q{n}?", "answer": "{n}"}}' for n in range(5)]
    rows.append('{"video": "a.mp4", "question": "Why?", "meta": {"kind": "cause"}}')
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    clips = load_clips(tmp_path)
    assert list(clips) == ["Clip 1: cause", "b"]
    assert clips["b"].suggestions == [f"Q{n}?" for n in range(MAX_SUGGESTIONS)]
    assert clips["b"].answers["Q3?"] == "3"
    assert clips["Clip 1: cause"].suggestions == ["Why?", *ALWAYS]


def test_every_bundled_clip_has_a_question() -> None:
    clips = load_clips(CLIPS)
    assert clips
    assert all(clip.answers for clip in clips.values())
