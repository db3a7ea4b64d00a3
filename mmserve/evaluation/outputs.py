"""The answers of an evaluation as lines of JSON: written as they come, read again by the next run.

A run that was stopped goes on where it was. Knows nothing about how answers are judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmserve.batch.answerers import Answer
from mmserve.errors import BadRequest

Json = dict[str, Any]

_BEGINNING = b'{"suite": '  # of every line


class Outputs:
    """A line per question and setting; use it as a context manager.

    `run` says what else the answers depend on (the model, how media are sampled): a file holds answers of
    one run. A last line that was cut off is dropped, and what failed is not answered.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self._run = dict(run)
        self._answers: dict[tuple[str, str, str], Answer] = {}
        whole = self._read(path)
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(whole)

    def _read(self, path: Path) -> int:
        """Learn what the file holds; returns the bytes up to the end of its last whole line."""
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        rest = content[whole:]
        # dropped only if it is ours: the file may be another one that somebody named by mistake
        if rest[: len(_BEGINNING)] != _BEGINNING[: len(rest)]:
            raise BadRequest(f"Expected {path.name} to end with an answer of an evaluation")
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                run, name = row["run"], _name(row["suite"], row["settings"], row["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise BadRequest(
                    f"Expected an answer of an evaluation in line {number} of {path.name}"
                ) from error
            if run != self._run:
                raise BadRequest(
                    f"Expected {path.name} to hold answers of this run, {json.dumps(self._run)}, "
                    f"but line {number} is of {json.dumps(run)}: name another file"
                )
            if "error" not in row:
                self._answers[name] = Answer(
                    text=row["answer"], usage=row["usage"], timings_ms=row["timings_ms"]
                )
        return whole

    def known(self, suite: str, settings: Json, question_id: str) -> Answer | None:
        return self._answers.get(_name(suite, settings, question_id))

    def append(self, row: Json) -> None:
        self._file.write(json.dumps({**row, "run": self._run}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _name(suite: str, settings: Json, question_id: str) -> tuple[str, str, str]:
    return suite, json.dumps(settings, sort_keys=True), question_id
