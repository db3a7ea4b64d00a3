"""The bundled clips with the questions that are known to fit them. Knows nothing about the page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ALWAYS = ("How many objects are there?", "How many times does the scene change?")
MAX_SUGGESTIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """`answers` maps a question to its known answer, None where nobody wrote it down."""

    title: str
    path: Path
    answers: dict[str, str | None]

    @property
    def suggestions(self) -> list[str]:
        return list(dict.fromkeys([*self.answers, *ALWAYS]))[:MAX_SUGGESTIONS]


def load_clips(folder: Path) -> dict[str, Clip]:
    """Every clip of a folder by its title; `questions.jsonl` beside them is optional."""
    answers: dict[str, dict[str, str | None]] = {}
    kinds: dict[str, str] = {}
    file = folder / "questions.jsonl"
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        row = json.loads(line)
        name = Path(row["video"]).name
        answers.setdefault(name, {})[row["question"]] = row.get("answer")
        kinds.setdefault(name, (row.get("meta") or {}).get("kind", ""))
    clips = {}
    for number, path in enumerate(sorted(folder.glob("*.mp4")), start=1):
        kind = kinds.get(path.name)
        title = f"Clip {number}: {kind}" if kind else path.stem.replace("_", " ")
        clips[title] = Clip(title=title, path=path, answers=answers.get(path.name, {}))
    return clips
