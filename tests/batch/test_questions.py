"""Reading rows: own and OpenAI's, relative paths, and rows that cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmserve.batch.questions import Question, media_part, modality_of, read_questions
from mmserve.errors import BadRequest, NotFound
from mmserve.sampling import SamplingParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("clip.mp4", "other.webm", "picture.PNG"):
        (tmp_path / name).write_bytes(b"media")
    return tmp_path


def read(folder: Path, *rows: object) -> list[Question]:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return read_questions(file, SamplingParams(max_tokens=7))


def test_an_own_row(folder: Path) -> None:
    row = {"id": "q1", "video": "clip.mp4", "question": "What?", "answer": "red", "meta": {"kind": "colour"}}
    (question,) = read(folder, row)
    assert question.problem is None
    assert (question.question_id, question.text, question.answer) == ("q1", "What?", "red")
    assert question.meta == {"kind": "colour"}
    assert question.sampling.max_tokens == 7
    path = str(folder / "clip.mp4")
    assert question.media == (path,)
    assert question.messages == (
        {"role": "user", "content": [{"type": "video", "video": path}, {"type": "text", "text": "What?"}]},
    )


def test_media_may_be_text_and_media_in_any_order(folder: Path) -> None:
    media = [
        {"type": "text", "text": "Item 1:"},
        {"type": "image", "image": "picture.PNG"},
        "other.webm",
        "https://example.org/a.jpg?x=1",
    ]
    (question,) = read(folder, {"id": 3, "media": media, "question": "Which?"})
    assert question.question_id == "3"
    (message,) = question.messages
    assert [part["type"] for part in message["content"]] == ["text", "image", "video", "image_url", "text"]
    assert len(question.media) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"video": ["a.png", "picture.PNG"]},
        {"video": [["a.png", "picture.PNG"]]},
        {"media": [{"type": "video", "video": ["a.png", "picture.PNG"]}]},
    ],
)
def test_pictures_are_the_frames_of_a_video(folder: Path, row: dict[str, Any]) -> None:
    (folder / "a.png").write_bytes(b"media")
    (question,) = read(folder, {"id": "q", "question": "What?", **row})
    assert question.problem is None
    paths = [str(folder / "a.png"), str(folder / "picture.PNG")]
    assert question.messages[0]["content"][0] == {"type": "video", "video": paths}
    assert question.media == tuple(paths)
    (folder / "a.png").unlink()
    (question,) = read(folder, {"id": "q", "question": "What?", **row})
    assert isinstance(question.problem, NotFound)


def test_videos_in_a_list_are_several(folder: Path) -> None:
    (question,) = read(folder, {"id": "q", "video": ["clip.mp4", "other.webm"], "question": "Which?"})
    assert [part["type"] for part in question.messages[0]["content"]] == ["video", "video", "text"]


def test_an_openai_line_says_how_media_are_sampled(folder: Path) -> None:
    part = {"type": "video_url", "video_url": {"url": "clip.mp4"}, "uuid": "c", "fps": 2}
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}
    line = {"custom_id": "a", "body": {**body, "media_io_kwargs": {"video": {"num_frames": 3}}}}
    wrong = {"custom_id": "b", "body": {**body, "media_io_kwargs": {"video": {"frames": 3}}}}
    good, bad = read(folder, line, wrong)
    assert good.media_io == {"video": {"num_frames": 3}}
    assert good.messages[0]["content"][0] == {
        "type": "video",
        "video": str(folder / "clip.mp4"),
        "uuid": "c",
        "fps": 2,
    }
    assert isinstance(bad.problem, BadRequest)


def test_options_are_listed_in_the_prompt(folder: Path) -> None:
    row = {
        "id": "q",
        "image": "picture.PNG",
        "question": "Which?",
        "options": ["A. x", "B. y"],
        "answer": "B",
    }
    (question,) = read(folder, row)
    assert question.options == ("x", "y")
    assert "A. x\nB. y" in question.messages[0]["content"][-1]["text"]
    assert question.text == "Which?"


def test_a_span_of_the_video(folder: Path) -> None:
    row = {"id": "q", "video": "clip.mp4", "question": "What?"}
    spans = read(
        folder, {**row, "start": 1, "end": 2.5}, {**row, "id": "r", "end": 4}, {**row, "id": "s", "start": 3}
    )
    assert [question.span for question in spans] == [(1.0, 2.5), (0.0, 4.0), (3.0, None)]


def test_an_openai_line(folder: Path) -> None:
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What?"},
                    {"type": "image_url", "image_url": {"url": "picture.PNG"}},
                    {"type": "video_url", "video_url": {"url": "https://example.org/v.mp4"}},
                ],
            },
        ],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "seed": 1,
        "stop": "x",
        "n": 1,
    }
    line = {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (question,) = read(folder, line)
    assert question.problem is None
    assert question.question_id == "c1"
    assert question.text == "What?"
    assert question.sampling == SamplingParams(max_tokens=5, temperature=0.5, seed=1, stop=("x",))
    assert question.media == (str(folder / "picture.PNG"), "https://example.org/v.mp4")
    assert question.body is not None
    assert question.body["messages"][1]["content"][1] == {
        "type": "image",
        "image": str(folder / "picture.PNG"),
    }


GOOD = {"id": "bad", "video": "clip.mp4", "question": "What?"}
BAD: list[tuple[Any, str]] = [
    ({**GOOD, "video": "absent.mp4"}, "there is none"),
    ({**GOOD, "image": "picture.PNG"}, "one of video, image and media"),
    ({"id": "bad", "question": "What?"}, "one of video, image and media"),
    ({**GOOD, "question": "  "}, "question"),
    ({**GOOD, "anwser": "x"}, "anwser"),
    ({**GOOD, "options": ["one"]}, "options"),
    ({**GOOD, "options": ["x", "y"], "answer": "z"}, "one of the options"),
    ({**GOOD, "answer": ["x"]}, "answer"),
    ({**GOOD, "start": 3, "end": 3}, "end after start"),
    ({**GOOD, "end": -1}, "0 or more"),
    ({**GOOD, "end": True}, "0 or more"),
    ({**GOOD, "video": 3}, "path or URL"),
    ({**GOOD, "video": []}, "at least one item"),
    ({**GOOD, "meta": 3}, "meta"),
    ({"id": "bad", "media": [{"type": "audio"}], "question": "What?"}, "type"),
    ({"custom_id": "bad", "url": "/v1/embeddings", "body": {}}, "/v1/chat/completions"),
    ({"custom_id": "bad", "body": {}}, "messages"),
    ({"custom_id": "bad", "body": []}, "body"),
    ({"custom_id": "bad", "body": {"messages": [{"role": "user", "content": "x"}], "n": 3}}, "no n"),
    ({"custom_id": "bad", "body": {"messages": [{"role": "user", "content": "x"}], "seed": 0.5}}, "seed"),
    ({"custom_id": "bad", "body": {"messages": [{"role": "user", "content": "x"}], "top_p": 7}}, "top_p"),
    ({"custom_id": "bad", "body": {"messages": [{"role": "user", "content": "x"}], "stop": [1]}}, "stop"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_keeps_its_id_and_says_why(folder: Path, row: dict[str, Any], reason: str) -> None:
    good, bad = read(folder, {**GOOD, "id": "good"}, row)
    assert good.problem is None
    assert bad.question_id == "bad"
    assert bad.problem is not None
    assert reason in bad.problem.public_message


@pytest.mark.parametrize("line", ["{", "[1]", '{"id": null}', '{"id": ""}', "\x00\x01", "[" * 100_000])
def test_a_line_without_an_id_is_named_by_its_number(folder: Path, line: str) -> None:
    good, bad = read(folder, {**GOOD, "id": "good"}, line)
    assert good.problem is None
    assert bad.question_id == "line-2"
    assert bad.problem is not None


def test_empty_lines_are_no_questions(folder: Path) -> None:
    assert [
        question.line for question in read(folder, "", {**GOOD, "id": "a"}, "  ", {**GOOD, "id": "b"})
    ] == [2, 4]


def test_an_id_twice_stops_everything(folder: Path) -> None:
    with pytest.raises(BadRequest, match="'bad' is in lines 1 and 3"):
        read(folder, GOOD, {**GOOD, "id": "good"}, GOOD)


def test_the_file_must_be_readable(folder: Path) -> None:
    with pytest.raises(NotFound):
        read_questions(folder / "absent.jsonl")


@pytest.mark.parametrize(
    ("source", "modality"),
    [
        ("a.mp4", "video"),
        ("a.JPG", "image"),
        ("a.webp", "image"),
        ("a", "video"),
        ("https://example.org/a.png?b=c.mp4", "image"),
        ("https://example.org/watch", "video"),
        ("data:image/png;base64,AA==", "image"),
        ("data:video/mp4;base64,AA==", "video"),
    ],
)
def test_modality_by_ending(source: str, modality: str) -> None:
    assert modality_of(source) == modality


def test_urls_and_paths_become_different_parts() -> None:
    assert media_part("a.png") == {"type": "image", "image": "a.png"}
    assert media_part("https://h/a.mp4") == {"type": "video_url", "video_url": {"url": "https://h/a.mp4"}}
