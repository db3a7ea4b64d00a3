"""The same frames, however they arrive, give the same answer; names and sampling by every way in."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mmserve.errors import MediaNotFound
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.request import RequestOutput
from mmserve.sampling import SamplingParams

SHORT = SamplingParams(max_tokens=6)
FPS = 4.0


@pytest.fixture(scope="module")
def frames(basic_clips: list[tuple[Path, Example]]) -> list[Image.Image]:
    clip, _ = basic_clips[4]
    with av.open(str(clip)) as container:
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)][:8]


@pytest.fixture
def question(basic_clips: list[tuple[Path, Example]]) -> str:
    return basic_clips[4][1].question.text


def answer(llm: LLM, part: dict[str, Any], question: str, **more: Any) -> RequestOutput:  # noqa: ANN401
    message = {"role": "user", "content": [part, {"type": "text", "text": question}]}
    return llm.chat([message], SHORT, **more)[0]


def saved(image: Image.Image, kind: str, **more: Any) -> bytes:  # noqa: ANN401
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def url(kind: str, *files: bytes) -> str:
    return f"data:{kind};base64," + ",".join(base64.b64encode(file).decode() for file in files)


def test_frames_give_the_same_answer_however_they_arrive(
    llm: LLM, frames: list[Image.Image], question: str, tmp_path: Path
) -> None:
    array = np.stack([np.asarray(frame) for frame in frames])
    expected = answer(llm, {"type": "video", "video": array, "fps": FPS}, question)
    pngs = [saved(frame, "PNG") for frame in frames]
    mixed: list[object] = [*frames[:3], *array[3:5]]
    for number, png in enumerate(pngs[5:]):
        mixed.append(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.png").write_bytes(png)
    moving = tmp_path / "moving.webp"
    duration = round(1000 / FPS)
    frames[0].save(moving, save_all=True, append_images=frames[1:], duration=duration, lossless=True)
    ways: dict[str, dict[str, Any]] = {
        "list": {"type": "video", "video": mixed, "fps": FPS},
        "urls": {"type": "video", "video": [url("image/png", png) for png in pngs], "fps": FPS},
        "data": {"type": "video_url", "video_url": {"url": url("video/jpeg", *pngs)}, "fps": FPS},
        "webp": {"type": "video", "video": str(moving)},
        "webp url": {"type": "video_url", "video_url": {"url": url("image/webp", moving.read_bytes())}},
    }
    for name, part in ways.items():
        found = answer(llm, part, question)
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids, name
        (report,) = found.media
        assert (report.frames, report.lost_frames) == (8, 0), name
        assert report.timestamps_s == expected.media[0].timestamps_s, name


def test_a_broken_frame_is_reported_as_lost(llm: LLM, frames: list[Image.Image], question: str) -> None:
    jpegs = [saved(frame, "JPEG") for frame in frames]
    jpegs[3] = jpegs[3][:200]
    part = {"type": "video_url", "video_url": {"url": url("video/jpeg", *jpegs)}}
    (report,) = answer(llm, part, question).media
    assert (report.frames, report.lost_frames) == (7, 1)
    assert 3 / 2.0 not in report.timestamps_s


def test_an_animation_as_an_image_is_its_first_frame(
    llm: LLM, frames: list[Image.Image], question: str, tmp_path: Path
) -> None:
    moving, still = tmp_path / "moving.webp", tmp_path / "still.png"
    frames[0].save(moving, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    frames[0].save(still)
    first = answer(llm, {"type": "image", "image": str(moving)}, question)
    second = answer(llm, {"type": "image", "image": str(still)}, question)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert (first.media[0].frames, first.media[0].timestamps_s) == (1, (0.0,))


def test_media_sent_before_are_not_encoded_again(llm: LLM, frames: list[Image.Image], question: str) -> None:
    first = answer(llm, {"type": "video", "video": frames, "fps": FPS, "uuid": "clip"}, question)
    again = answer(llm, {"type": "video", "uuid": "clip"}, question)
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    assert again.usage.visual_tokens_cached >= again.usage.visual_tokens - 1
    with pytest.raises(MediaNotFound, match="'other'"):
        answer(llm, {"type": "video", "uuid": "other"}, question)


def test_a_call_may_say_how_media_are_sampled(
    llm: LLM, basic_clips: list[tuple[Path, Example]], frames: list[Image.Image], question: str
) -> None:
    clip, _ = basic_clips[4]
    kwargs = {"video": {"num_frames": 3, "start": 0.2, "max_pixels": 32 * 32}}
    (report,) = answer(llm, {"type": "video", "video": clip}, question, media_io_kwargs=kwargs).media
    assert report.frames == 3
    assert min(report.timestamps_s) >= 0.19
    assert report.width * report.height <= 32 * 32
    part = {"type": "video", "video": frames, "fps": FPS}
    (report,) = answer(llm, part, question, media_io_kwargs={"video": {"num_frames": 2}}).media
    assert report.timestamps_s == (0.0, 1.0)
