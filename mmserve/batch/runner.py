"""Runs a file of questions: bounded concurrency, a row per question, and continuing where it stopped.

Knows nothing about models or HTTP; `answerers` do.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmserve.batch.answerers import Answer, Answerer
from mmserve.batch.answers import AnswerFile
from mmserve.batch.questions import Question
from mmserve.batch.score import is_correct
from mmserve.errors import BadRequest, MMServeError

Json = dict[str, Any]


def select(questions: Sequence[Question], *, limit: int | None, shard: tuple[int, int]) -> list[Question]:
    """Every n-th question beginning with the i-th for the shard (i, n), then the first `limit` of them."""
    index, count = shard
    return list(questions[index - 1 :: count])[:limit]


def parse_shard(text: str) -> tuple[int, int]:
    """The second of four shards is "2/4"."""
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise BadRequest(f"Expected a shard such as 1/4, from 1/4 to 4/4, but got {text}")


def answer_all(
    questions: Sequence[Question], answerer: Answerer, concurrency: int
) -> Iterator[tuple[Question, Answer]]:
    """Every question with its answer, as they finish; at most `concurrency` run at the same time."""
    finished: queue.SimpleQueue[tuple[Question, Answer]] = queue.SimpleQueue()
    running = 0

    def listener(question: Question) -> Callable[[Answer], None]:
        return lambda answer: finished.put((question, answer))

    for question in questions:
        if question.problem is not None:
            yield question, Answer(error=question.problem)
            continue
        answerer.start(question, listener(question))
        running += 1
        while running >= concurrency or not finished.empty():
            yield finished.get()
            running -= 1
    for _ in range(running):
        yield finished.get()


def run(
    questions: Sequence[Question],
    answerer: Answerer,
    file: AnswerFile,
    *,
    concurrency: int,
    on_row: Callable[[], None],
) -> None:
    """Answer what the file does not answer yet; it is complete and in order when this returns."""
    todo = [question for question in questions if question.question_id not in file.rows]
    for question, answer in answer_all(todo, answerer, concurrency):
        file.append(row_of(question, answer))
        on_row()


def row_of(question: Question, answer: Answer) -> Json:
    """The line of the answers' file."""
    if question.body is not None:
        return _openai_row(question, answer)
    row: Json = {"id": question.question_id, "answer": None if answer.error else answer.text}
    if question.answer is not None:
        row["correct"] = not answer.error and is_correct(answer.text, question.answer, question.options)
    row |= {"usage": answer.usage, "timings_ms": answer.timings_ms}
    if answer.methods is not None:
        row["methods"] = answer.methods
    if answer.error is not None:
        row["error"] = _error(answer.error)
    return row


def _openai_row(question: Question, answer: Answer) -> Json:
    digest = hashlib.sha256(question.question_id.encode()).hexdigest()[:24]
    row: Json = {"id": f"batch_req_{digest}", "custom_id": question.question_id}
    if answer.error is not None:
        body: Json = {"error": _error(answer.error)}
        status = answer.error.status
    else:
        status, body = 200, _chat_completion(question, answer, digest)
    row["response"] = {"status_code": status, "request_id": f"req_{digest}", "body": body}
    row["error"] = None if answer.error is None else _error(answer.error)
    return row


def _chat_completion(question: Question, answer: Answer, digest: str) -> Json:
    prompt, completion = answer.usage.get("prompt_tokens", 0), answer.usage.get("completion_tokens", 0)
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        "model": (question.body or {}).get("model", ""),
        "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "mmserve": {"usage": answer.usage, "timings_ms": answer.timings_ms, "methods": answer.methods},
        },
    }


def _error(error: MMServeError) -> Json:
    return {"code": error.code, "message": error.public_message}


def is_error(row: Json) -> bool:
    return row.get("error") is not None


def report_of(row: Json) -> Json:
    """`usage`, `timings_ms` and `methods` of a row of either kind, as far as it has them."""
    if "custom_id" not in row:
        return row
    body = (row.get("response") or {}).get("body") or {}
    report: Json = (body.get("usage") or {}).get("mmserve") or {}
    return report


def text_of(row: Json) -> str:
    """The answer in a row of either kind, or its error's message."""
    if is_error(row):
        return str(row["error"].get("message", ""))
    if "custom_id" in row:
        return str(row["response"]["body"]["choices"][0]["message"]["content"])
    return str(row["answer"])


def check_methods(rows: Sequence[Json], methods: Json) -> None:
    """Raise when rows of an earlier run were made with other methods: together they measure nothing."""
    for row in rows:
        earlier = report_of(row).get("methods")
        if earlier is not None and earlier != methods:
            name = next(key for key in methods if earlier.get(key) != methods[key])
            raise BadRequest(
                f"Expected earlier answers with {name} {methods[name]}, but the file has "
                f"{earlier.get(name)}: name another file"
            )


def tally(questions: Sequence[Question], rows: dict[str, Json]) -> tuple[int, int] | None:
    """How many of the questions with an answer key are right, of how many; None when there is no key."""
    keyed = [question for question in questions if question.answer is not None]
    if not keyed:
        return None
    return sum(rows[question.question_id].get("correct") is True for question in keyed), len(keyed)
