"""`media_io_kwargs`: vLLM's names, strict, and a later word in place of an earlier one."""

from __future__ import annotations

import pytest

from mmserve.errors import BadRequest, MMServeError
from mmserve.media.options import media_io_kwargs, media_options
from mmserve.request import MediaOptions

ALL = {"num_frames": 4, "start": 1, "end": 2.5, "max_pixels": 100, "keyframes": True}


def test_every_field_is_read_and_written() -> None:
    options = MediaOptions(num_frames=4, start_s=1.0, end_s=2.5, max_pixels=100, keyframes_only=True)
    assert media_options({"video": ALL}) == options
    assert media_io_kwargs(options) == {"video": ALL}
    assert media_io_kwargs(MediaOptions()) == {}
    assert media_options({}) == media_options({"image": {}, "video": {"fps": None}}) == MediaOptions()


def test_what_is_not_said_is_as_before() -> None:
    before = MediaOptions(num_frames=4, max_pixels=100)
    assert media_options({}, before) == before
    assert media_options({"video": {"fps": 2}}, before) == MediaOptions(fps=2.0, max_pixels=100)
    assert media_options({"video": {"num_frames": 8}}, MediaOptions(fps=1.0)) == MediaOptions(num_frames=8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "as an object, but got int"),
        ({"audio": {}}, "an object video"),
        ({"video": []}, "an object video"),
        ({"image": {"x": 1}}, "image to be empty"),
        ({"video": {"frames": 4}}, "but got 'frames'"),
        ({"video": {"num_frames": 4.5}}, "num_frames as a whole number, but got float"),
        ({"video": {"num_frames": True}}, "but got bool"),
        ({"video": {"fps": "2"}}, "fps as a number"),
        ({"video": {"keyframes": 1}}, "true or false"),
        ({"video": {"num_frames": 4, "fps": 2}}, "either num_frames or fps"),
        ({"video": {"num_frames": 0}}, "at least 1"),
        ({"video": {"num_frames": 5000}}, "at most 2048"),
        ({"video": {"start": 3, "end": 2}}, "an end after it"),
        ({"video": {"max_pixels": 0}}, "max_pixels of at least 1"),
    ],
)
def test_what_is_wrong_is_named(given: object, words: str) -> None:
    with pytest.raises(MMServeError, match=words) as caught:
        media_options(given)
    assert isinstance(caught.value, BadRequest) or "2048" in words
