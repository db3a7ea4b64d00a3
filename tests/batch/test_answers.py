"""The file of answers: repaired, continued, locked, and never with two rows for one id."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmserve.batch.answers import AnswerFile, id_of
from mmserve.errors import BadRequest, MMServeError

IDS = ("a", "b", "c", "d")


def never(row: dict[str, Any]) -> bool:
    return False


def line(row_id: str, **more: object) -> bytes:
    return json.dumps({"id": row_id, "answer": "x", **more}).encode() + b"\n"


def ids_of(path: Path) -> list[str]:
    return [id_of(json.loads(row)) for row in path.read_bytes().splitlines()]


def test_rows_are_on_disk_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "answers.jsonl"
    with AnswerFile(path, IDS, never) as file:
        file.append({"id": "b", "answer": "ü"})
        assert path.read_text(encoding="utf-8") == '{"id": "b", "answer": "ü"}\n'


@pytest.mark.parametrize(
    "torn", [b'{"id": "b", "ans', b"{", b"\0\0\0\0", b"\xff\xfe garbage", b'{"id": "b"}}\n', b"[]"]
)
def test_a_broken_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line("a") + torn)
    with AnswerFile(path, IDS, never) as file:
        assert list(file.rows) == ["a"]
        assert path.read_bytes() == line("a")
        file.append({"id": "b"})
    assert ids_of(path) == ["a", "b"]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line("a") + line("b").rstrip())
    with AnswerFile(path, IDS, never) as file:
        file.append({"id": "c"})
    assert ids_of(path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "content", [b"my diary\n", line("a") + b"what?\n" + line("b"), line("a") + line("z")]
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadRequest):
        AnswerFile(path, IDS, never)
    assert path.read_bytes() == content


def test_rows_to_ask_again_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line("a") + line("b", error={}) + line("c"))
    with AnswerFile(path, IDS, lambda row: "error" in row) as file:
        assert ids_of(path) == ["a", "c"]
        file.append({"id": "b"})
        file.finalise(IDS)
    assert ids_of(path) == ["a", "b", "c"]


def test_a_row_twice_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line("a") + line("a", answer="y"))
    with AnswerFile(path, IDS, never):
        assert ids_of(path) == ["a"]


def test_finalising_orders_the_rows_and_keeps_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line("c") + line("a"))
    path.chmod(0o640)
    with AnswerFile(path, IDS, never) as file:
        file.finalise(IDS)
        file.append({"id": "b"})
    assert ids_of(path) == ["a", "c", "b"]
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["answers.jsonl"]


@pytest.mark.parametrize("replaced", [False, True])
def test_only_one_program_may_write(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line("b") + line("a"))
    with AnswerFile(path, IDS, never) as file:
        if replaced:
            file.finalise(IDS)
        with pytest.raises(MMServeError, match="Another program"):
            AnswerFile(path, IDS, never)
    with AnswerFile(path, IDS, never) as file:
        assert len(file.rows) == 2


def test_openai_rows_are_known_by_their_custom_id() -> None:
    assert id_of({"id": "batch_req_1", "custom_id": "mine"}) == "mine"


# appends to "computed" what it computes, and dies by SIGKILL in its n-th write, which may be torn
CHILD = """
import os, signal, sys
from pathlib import Path
from mmserve.batch import answers
from mmserve.batch.answerers import Answer
from mmserve.batch.questions import Question
from mmserve.batch.runner import run

folder, count, dies_at, torn = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
real, calls = os.write, 0

def write(handle, data):
    global calls
    calls += 1
    if calls == dies_at:
        real(handle, bytes(data)[: int(len(data) * torn)])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(handle, data)

class Instant:
    def start(self, question, done):
        with open(folder / "computed", "a") as computed:
            computed.write(question.question_id + "\\n")
        done(Answer(text="x"))

os.write = write
questions = [Question(question_id=f"q{i}", line=i) for i in range(count)]
ids = [question.question_id for question in questions]
with answers.AnswerFile(folder / "answers.jsonl", ids, lambda row: False) as file:
    run(questions, Instant(), file, concurrency=3, on_row=lambda: None)
    file.finalise(ids)
"""


def test_killed_twenty_times_it_still_writes_every_row_once(tmp_path: Path) -> None:
    count, rng = 60, random.Random(0)
    path = tmp_path / "answers.jsonl"
    finished: set[str] = set()
    computed_before = 0
    for attempt in range(21):
        dies_at = 0 if attempt == 20 else rng.randrange(1, 5)
        torn = rng.choice([0.0, rng.random(), 1.0])
        child = [sys.executable, "-c", CHILD, str(tmp_path), str(count), str(dies_at), str(torn)]
        result = subprocess.run(
            child, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": "."}
        )
        assert result.returncode == (-signal.SIGKILL if dies_at else 0), result.stderr.decode()
        computed = (tmp_path / "computed").read_text().split() if (tmp_path / "computed").exists() else []
        assert not finished & set(computed[computed_before:]), "a finished row was computed again"
        computed_before = len(computed)
        finished = set(whole_rows(path))
    assert ids_of(path) == [f"q{i}" for i in range(count)]
    assert set(Counter(ids_of(path)).values()) == {1}


def whole_rows(path: Path) -> list[str]:
    found = []
    for row in path.read_bytes().split(b"\n"):
        try:
            found.append(id_of(json.loads(row)))
        except ValueError:
            continue
    assert len(found) == len(set(found))
    return found
