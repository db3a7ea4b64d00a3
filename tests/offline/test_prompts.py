"""vLLM's prompts: taken as they are, with each media item at its placeholder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmserve.errors import BadRequest
from mmserve.media.framelist import DEFAULT_FPS
from mmserve.offline.prompts import Inputs, read_messages, read_prompt
from mmserve.request import MediaOptions
from tests.offline.fakes import CHAT, say

OPTIONS = MediaOptions(num_frames=3)
FRAMES = np.zeros((2, 4, 4, 3), np.uint8)
PICTURE = Image.new("RGB", (4, 4))


def read(prompt: Any) -> Inputs:  # noqa: ANN401  # wrong kinds too
    return read_prompt(prompt, CHAT, OPTIONS)


def test_text_is_not_put_into_the_chat_template() -> None:
    assert CHAT.decode(read("a red square").token_ids) == "a red square"
    assert read("a red square") == read({"prompt": "a red square"})


def test_special_tokens_in_text_are_what_they_spell() -> None:
    asked = say("What moves?", {"type": "image", "image": "a.png"})
    by_template = read_messages(asked, CHAT, OPTIONS)
    text = CHAT.tokenizer.decode(list(by_template.token_ids), skip_special_tokens=False)
    by_hand = read({"prompt": text, "multi_modal_data": {"image": "a.png"}})
    assert by_hand == by_template
    assert read({"prompt_token_ids": by_hand.token_ids, "multi_modal_data": {"image": "a.png"}}) == by_hand


def test_media_stand_in_the_order_of_their_placeholders() -> None:
    data = {"image": ["a.png", PICTURE], "video": (FRAMES, {"fps": 4.0})}
    token_ids, media = read({"prompt": "<image> then <video> or <image>", "multi_modal_data": data})
    assert [part.modality for part in media] == ["image", "video", "image"]
    assert [token for token in token_ids if token in (CHAT.image_token, CHAT.video_token)] == [
        CHAT.image_token,
        CHAT.video_token,
        CHAT.image_token,
    ]
    assert media[0].content == "a.png"
    assert media[1].content is FRAMES
    assert media[2].content is PICTURE
    assert [part.fps for part in media] == [None, 4.0, None]
    assert all(part.options is OPTIONS for part in media)


@pytest.mark.parametrize(
    ("video", "fps"),
    [
        (FRAMES, [DEFAULT_FPS]),
        ([FRAMES, Path("b.mp4")], [DEFAULT_FPS, None]),
        ("c.mp4", [None]),
        ((FRAMES, {}), [2.0]),
        ([PICTURE, PICTURE], [None]),
        (([PICTURE, "a.png"], {"fps": 5.0}), [5.0]),
        ([["a.png", PICTURE], "b.mp4"], [None, None]),
    ],
)
def test_videos_come_one_or_several_as_paths_or_frames(video: object, fps: list[float | None]) -> None:
    prompt = {"prompt": "<video>" * len(fps), "multi_modal_data": {"video": video}}
    assert [part.fps for part in read(prompt).media] == fps


def test_pictures_in_a_list_are_the_frames_of_one_video() -> None:
    data = {"video": [["a.png", PICTURE], "b.mp4"]}
    first, second = read({"prompt": "<video><video>", "multi_modal_data": data}).media
    assert first.content == ("a.png", PICTURE)
    assert second.content == "b.mp4"
    (only,) = read({"prompt": "<video>", "multi_modal_data": {"video": [PICTURE, PICTURE]}}).media
    assert len(only.content) == 2


def test_media_may_have_names() -> None:
    prompt = {"prompt": "<image><image>", "multi_modal_data": {"image": ["a.png", None]}}
    parts = read({**prompt, "multi_modal_uuids": {"image": [None, "two"]}}).media
    assert [(part.content, part.uuid) for part in parts] == [("a.png", None), (None, "two")]
    (part,) = read({"prompt": "<image>", "multi_modal_uuids": {"image": "one"}}).media
    assert (part.content, part.uuid) == (None, "one")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (5, "Expected a prompt as text or an object, but got int"),
        ("", "at least one token"),
        ({}, "either prompt or prompt_token_ids"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either prompt or prompt_token_ids"),
        ({"prompt": 5}, "Expected prompt as text, but got int"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": "a", "text": "b"}, "but got 'text'"),
        ({"prompt_token_ids": []}, "at least one token"),
        ({"prompt_token_ids": "12"}, "a list of numbers"),
        ({"prompt_token_ids": [1, -1]}, "but got -1"),
        ({"prompt_token_ids": [10**9]}, "but got 1000000000"),
        ({"prompt_token_ids": [True]}, "but got True"),
        ({"prompt": "a", "multi_modal_data": {"audio": "x"}}, "image, video or both"),
        ({"prompt": "a", "multi_modal_data": ["x"]}, "image, video or both"),
        ({"prompt": "a", "multi_modal_data": {"image": "x"}}, "but got 0 and 1"),
        ({"prompt": "<image>"}, "as many image placeholders"),
        ({"prompt": "<image>", "multi_modal_data": {"video": FRAMES}}, "but got 1 and 0"),
        ({"prompt": "<image>", "multi_modal_data": {"image": [None]}}, "but got nothing"),
        ({"prompt": "<image>", "multi_modal_data": {"image": [["a.png"]]}}, "but got a list"),
        ({"prompt": "<video>", "multi_modal_data": {"video": (["a.png"], {"fps": "x"})}}, "but got 'x'"),
        (
            {
                "prompt": "<image>",
                "multi_modal_data": {"image": "a"},
                "multi_modal_uuids": {"image": ["x", "y"]},
            },
            "1 image names",
        ),
        ({"prompt": "<image>", "multi_modal_uuids": {"image": [5]}}, "as text of 1 to"),
        ({"prompt": "<image>", "multi_modal_uuids": "x"}, "multi_modal_uuids with image"),
    ],
)
def test_what_is_not_a_prompt_is_refused(prompt: object, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        read(prompt)
