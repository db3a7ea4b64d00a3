"""parse: what the template gets, which media stand where, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmserve.conversation import MediaPart, parse
from mmserve.errors import BadRequest
from mmserve.request import MediaOptions

URL = "https://example.org/a.png"


def user(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": list(parts)}]


def test_media_are_separated_in_order_of_appearance() -> None:
    options = MediaOptions(num_frames=4)
    array = np.zeros((2, 4, 4, 3), np.uint8)
    conversation = parse(
        [
            {"role": "system", "content": "Be short."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": array, "fps": 2.0},
                    {"type": "text", "text": "Which?"},
                    {"type": "image_url", "image_url": {"url": URL}},
                ],
            },
            {"role": "assistant", "content": "The red one."},
            {"role": "user", "content": [{"type": "video_url", "video_url": URL}]},
        ],
        options=options,
        on_this_host=True,
    )
    assert conversation.messages == (
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "video"}, {"type": "text", "text": "Which?"}, {"type": "image"}],
        },
        {"role": "assistant", "content": "The red one."},
        {"role": "user", "content": [{"type": "video"}]},
    )
    first, second, third = conversation.media
    assert (first.modality, first.content is array, first.fps) == ("video", True, 2.0)
    assert second == MediaPart("image", URL, options)
    assert third == MediaPart("video", URL, options)


def test_frames_come_as_a_list_of_urls() -> None:
    (part,) = parse(user({"type": "video", "video": [URL, "data:image/png;base64,AAAA"], "fps": 4})).media
    assert part == MediaPart("video", (URL, "data:image/png;base64,AAAA"), fps=4.0)
    array = np.zeros((4, 4, 3), np.uint8)
    frames = [Path("a.png"), array]
    (part,) = parse(user({"type": "video", "video": frames}), on_this_host=True).media
    assert part.content[0] == Path("a.png")
    assert part.content[1] is array


def test_media_sent_before_need_a_name_only() -> None:
    sent, null, missing, empty, frames = parse(
        user(
            {"type": "image_url", "image_url": {"url": URL}, "uuid": "one"},
            {"type": "image_url", "image_url": None, "uuid": "one"},
            {"type": "video_url", "uuid": "two"},
            {"type": "video_url", "video_url": {"url": None}, "uuid": "two"},
            {"type": "video", "video": None, "uuid": "three"},
        )
    ).media
    assert sent == MediaPart("image", URL, uuid="one")
    assert null == MediaPart("image", None, uuid="one")
    assert missing == empty == MediaPart("video", None, uuid="two")
    assert frames == MediaPart("video", None, uuid="three")


def test_options_default_to_those_of_the_model() -> None:
    (part,) = parse(user({"type": "image_url", "image_url": {"url": URL}})).media
    assert part.options == MediaOptions()


def test_nothing_but_checked_fields_reaches_the_template() -> None:
    parsed = parse([{"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}], "name": "y"}])
    assert parsed.messages == ({"role": "user", "content": [{"type": "text", "text": "x"}]},)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "a list of at least one message"),
        ("hello", "messages as a list"),
        (None, "but got nothing"),
        ({"role": "user"}, "messages as a list"),
        (["hello"], r"messages\[0\] as an object, but got str"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role as one of system, user, assistant"),
        ([{"content": "x"}], "but got None"),
        ([{"role": ["user"], "content": "x"}], "role as one of"),
        ([{"role": "user"}], "content as text or a list of parts, but got nothing"),
        ([{"role": "user", "content": " \n"}], "it is empty"),
        ([{"role": "user", "content": []}], "but got list"),
        ([{"role": "user", "content": 7}], "but got int"),
        ([{"role": "user", "content": b"bytes"}], r"content\[0\] as an object, but got int"),
        (user("text"), r"content\[0\] as an object, but got str"),
        (user({"type": "text"}), r"content\[0\].text as text, but got nothing"),
        (
            user({"type": "text", "text": "x"}, {"type": "audio"}),
            r"content\[1\].type as one of text, image_url",
        ),
        (user({"type": "image_url"}), "image_url.url as a URL, but got nothing"),
        (user({"type": "image_url", "image_url": {"url": ""}}), "as a URL"),
        (user({"type": "image_url", "image_url": {"url": 5}}), "but got int"),
        (user({"type": "image", "image": "/etc/passwd"}), "as one of text, image_url, video_url, video,"),
        (user({"type": "video", "video": "/etc/passwd"}), "video as a list of image URLs, the frames, but"),
        (user({"type": "video"}), "but got nothing"),
        (user({"type": "video", "video": []}), "a list of 1 to 2048 frames, but got 0"),
        (user({"type": "video", "video": [URL] * 2049}), "but got 2049"),
        (user({"type": "video", "video": [URL, 5]}), r"video\[1\] as the URL of an image, but got int"),
        (user({"type": "video", "video": [URL, ""]}), r"video\[1\] as the URL of an image, but got str"),
        (user({"type": "video", "video": [[URL]]}), r"video\[0\] as the URL of an image, but got list"),
        (user({"type": "video", "video": [URL], "fps": 0}), r"content\[0\].fps above 0 and at most 1000"),
        (user({"type": "video", "video": [URL], "fps": "2"}), "but got '2'"),
        (user({"type": "video", "video": [URL], "fps": True}), "but got True"),
        (user({"type": "image_url", "image_url": URL, "uuid": 5}), "uuid as text of 1 to 512 characters"),
        (user({"type": "image_url", "uuid": ""}), "uuid as text of 1 to 512 characters"),
        (user({"type": "image_url", "uuid": "x" * 513}), "uuid as text of 1 to 512 characters"),
        (user({"type": "image_url", "uuid": "\ud83d"}), "uuid as Unicode text"),
        (
            user({"type": "image_url", "image_url": URL, "num_frames": 4}),
            "fps, image_url, type, uuid, but got",
        ),
        (user({"type": "image_url", "image_url": {"url": URL, "fps": 2}}), "image_url with detail, url, but"),
        ([{"role": "user", "content": "half \ud83d"}], r"messages\[0\].content as Unicode text"),
        (user({"type": "text", "text": "\udc00"}), r"content\[0\].text as Unicode text"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(messages: object, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        parse(messages)


@pytest.mark.parametrize("here", [False, True])
def test_a_key_that_would_be_ignored_is_refused_by_every_way_in(here: bool) -> None:
    with pytest.raises(BadRequest, match=r"but got 'num_frames' \(how media are sampled"):
        parse(user({"type": "video", "video": [URL], "num_frames": 4}), on_this_host=here)
    ignored = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
    assert parse(user(ignored), on_this_host=here).media[0].content == URL


def test_local_media_need_something_to_read() -> None:
    with pytest.raises(BadRequest, match="a path, image or array, but got nothing"):
        parse(user({"type": "image"}), on_this_host=True)
    (part,) = parse(user({"type": "image", "image": Path("/x.png")}), on_this_host=True).media
    assert part.content == Path("/x.png")


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize(
    ("messages", "limit"),
    [
        (lambda extra: [{"role": "user", "content": "x"}] * (3 + extra), {"max_messages": 3}),
        (lambda extra: user(*[{"type": "text", "text": "x"}] * (2 + extra)), {"max_parts": 2}),
    ],
)
def test_limits_are_inclusive(messages: Callable[[int], object], limit: dict[str, int], over: bool) -> None:
    with pytest.raises(BadRequest, match="at most") if over else nullcontext():
        parse(messages(int(over)), **limit)  # type: ignore[arg-type]  # keywords of numbers only


def test_a_clients_value_cannot_flood_the_reply() -> None:
    with pytest.raises(BadRequest) as caught:
        parse([{"role": "x" * 10_000, "content": "x"}])
    assert len(caught.value.public_message) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(
    JSON | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": JSON}), min_size=1, max_size=3)
)
def test_any_json_is_parsed_or_refused(messages: Any) -> None:  # noqa: ANN401  # JSON has no common type
    try:
        parsed = parse(messages)
    except BadRequest:
        return
    placeholders = [p for m in parsed.messages if isinstance(m["content"], list) for p in m["content"]]
    assert sum(part["type"] != "text" for part in placeholders) == len(parsed.media)
