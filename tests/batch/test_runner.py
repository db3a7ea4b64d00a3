"""Running questions: bounded concurrency, rows of both kinds, shards, marks, and earlier methods."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mmserve.batch.answerers import Answer, LocalAnswerer
from mmserve.batch.answers import AnswerFile
from mmserve.batch.questions import Question
from mmserve.batch.runner import (
    answer_all,
    check_methods,
    is_error,
    parse_shard,
    report_of,
    row_of,
    run,
    select,
    tally,
    text_of,
)
from mmserve.errors import BadRequest, MediaError
from mmserve.request import MediaOptions, Methods
from tests.fake_llm import FakeLLM


def question(question_id: str, **more: Any) -> Question:  # noqa: ANN401
    text = more.pop("text", question_id)
    messages = ({"role": "user", "content": [{"type": "text", "text": text}]},)
    return Question(question_id=question_id, line=1, text=text, messages=messages, **more)


class Slow:
    """Holds every answer until `most` questions are in flight or no more come."""

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] = []
        self.most = 0
        self.lock = threading.Lock()

    def start(self, asked: Question, done: Callable[[Answer], None]) -> None:
        with self.lock:
            self.held.append(lambda: done(Answer(text=asked.text)))
            self.most = max(self.most, len(self.held))
            if len(self.held) == 3:
                held, self.held = self.held, []
                threading.Thread(target=lambda: [release() for release in reversed(held)]).start()


def test_at_most_so_many_run_together_and_each_is_answered_once() -> None:
    slow = Slow()
    asked = [question(f"q{i}") for i in range(12)]
    answers = list(answer_all(asked, slow, concurrency=3))
    assert slow.most == 3
    assert sorted(q.question_id for q, _ in answers) == sorted(q.question_id for q in asked)
    assert all(q.text == answer.text for q, answer in answers)


def test_a_question_with_a_problem_is_not_asked() -> None:
    llm = FakeLLM()
    bad = question("bad", problem=BadRequest("no"))
    pairs = list(answer_all([bad, question("good")], local(llm), concurrency=1))
    assert llm.asked == ["good"]
    assert [answer.error is not None for _, answer in pairs] == [True, False]


def local(llm: FakeLLM, methods: Methods | None = None) -> LocalAnswerer:
    return LocalAnswerer(llm, methods or Methods(), MediaOptions(num_frames=4))


def test_errors_are_isolated_and_the_file_is_complete(tmp_path: Path) -> None:
    llm = FakeLLM(lambda text: MediaError("broken") if text == "b" else text.upper())
    asked = [question(name, answer="A") for name in "abc"]
    with AnswerFile(tmp_path / "answers.jsonl", "abc", lambda row: False) as file:
        run(asked, local(llm), file, concurrency=2, on_row=lambda: None)
        assert {row_id: is_error(row) for row_id, row in file.rows.items()} == {
            "a": False,
            "b": True,
            "c": False,
        }
        assert file.rows["b"]["error"] == {"code": "media_error", "message": "broken"}
        assert tally(asked, file.rows) == (1, 3)
        run(asked, local(llm), file, concurrency=2, on_row=lambda: None)
    assert len(llm.asked) == 3
    assert llm.options[0] == MediaOptions(num_frames=4)


def test_an_own_row() -> None:
    answer = answered("red", Methods(prune="holitom", keep=0.5))
    row = row_of(question("q", answer="Red."), answer)
    assert row["id"] == "q"
    assert row["answer"] == "red"
    assert row["correct"] is True
    assert row["usage"]["visual_tokens_kept"] == 50
    assert row["timings_ms"]["total"] == 11.0
    assert "error" not in row
    assert "correct" not in row_of(question("q"), answer)


def test_an_openai_row() -> None:
    body = {"model": "m", "messages": []}
    row = row_of(question("q", body=body), answered("red"))
    assert row["custom_id"] == "q"
    assert row["id"] != "q"
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    reply = row["response"]["body"]
    assert reply["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "red"},
        "finish_reason": "stop",
    }
    assert reply["usage"]["total_tokens"] == 113
    assert report_of(row)["usage"]["visual_tokens"] == 100
    assert text_of(row) == "red"


def test_an_openai_row_of_a_failure() -> None:
    row = row_of(question("q", body={}), Answer(error=MediaError("broken")))
    assert row["response"]["status_code"] == 422
    assert row["error"] == row["response"]["body"]["error"] == {"code": "media_error", "message": "broken"}
    assert is_error(row)
    assert text_of(row) == "broken"


def answered(text: str, methods: Methods | None = None) -> Answer:
    (pair,) = answer_all([question("q")], local(FakeLLM(lambda _: text), methods), concurrency=1)
    return pair[1]


def test_shards_are_disjoint_and_complete() -> None:
    asked = [question(f"q{i}") for i in range(10)]
    shards = [select(asked, limit=None, shard=(i, 3)) for i in (1, 2, 3)]
    assert sorted(q.question_id for shard in shards for q in shard) == sorted(q.question_id for q in asked)
    assert [len(shard) for shard in shards] == [4, 3, 3]
    assert select(asked, limit=2, shard=(2, 3)) == shards[1][:2]
    assert parse_shard("2/3") == (2, 3)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/", "-1/3", "1/0"])
def test_a_shard_must_exist(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_shard(text)


def test_rows_of_other_methods_are_not_mixed() -> None:
    rows = [row_of(question("q"), answered("x", Methods(prune="random", keep=0.5)))]
    check_methods(rows, msgspec.to_builtins(Methods(prune="random", keep=0.5)))
    with pytest.raises(BadRequest, match="prune none, but the file has random"):
        check_methods(rows, msgspec.to_builtins(Methods()))
    check_methods([row_of(question("q"), Answer(error=MediaError("x")))], msgspec.to_builtins(Methods()))


def test_without_a_key_there_is_no_mark() -> None:
    assert tally([question("q")], {"q": {}}) is None
