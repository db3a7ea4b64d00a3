"""Media and text that mean harm, through every stage: answered or refused in our words, all workers alive."""

from __future__ import annotations

import io
import random
import re
import string
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from mmserve.errors import BadRequest, MMServeError
from mmserve.llm import LLM
from mmserve.request import Chunk, RequestOutput
from mmserve.sampling import SamplingParams
from tests.e2e.hostile import garbage, video_of
from tests.e2e.serving import image_part, serving

SHORT = SamplingParams(max_tokens=1)
AT_ONCE = 16
LEAKS = re.compile(
    r"0x[0-9a-f]{6,}|Traceback|File \"|/work|/usr|/tmp|/home|/dev|site-packages|BytesIO|"
    r"\b(PIL|Pillow|PyAV|libav|ffmpeg|numpy|torch|av\.error|msgspec|pydantic|starlette|uvicorn)\b|Errno",
    re.IGNORECASE,
)
MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16")
SIDES = (1, 2, 3, 27, 28, 29, 1023, 16_384)


def outcomes(
    llm: LLM, conversations: Iterable[Sequence[dict[str, Any]]]
) -> list[RequestOutput | MMServeError]:
    """How each ends; some run at once."""
    found: dict[int, RequestOutput | MMServeError] = {}
    places = threading.Semaphore(AT_ONCE)

    def into(number: int, news: Chunk | RequestOutput | MMServeError) -> None:
        if not isinstance(news, Chunk):
            found[number] = news
            places.release()

    asked = list(conversations)
    for number, conversation in enumerate(asked):
        places.acquire()
        try:
            llm.submit(conversation, SHORT, deliver=partial(into, number))
        except MMServeError as error:
            into(number, error)
    for _ in range(AT_ONCE):
        assert places.acquire(timeout=120), "a request has no end"
    return [found[number] for number in range(len(asked))]


def about(*parts: dict[str, Any], text: str = "What is this?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def check_status(outcome: RequestOutput | MMServeError, what: object) -> None:
    """200 or 4xx."""
    if isinstance(outcome, MMServeError):
        assert 400 <= outcome.status < 500, (what, outcome.public_message)
        assert LEAKS.search(outcome.public_message) is None, (what, outcome.public_message)


# R14


def test_garbage_is_refused_in_our_own_words(epd: LLM) -> None:
    """R14 in small, by the messages that bodies are made from."""
    rng = random.Random(14)
    workers = epd.worker_pids()
    parts = [(image_part if number % 2 else video_of)(garbage(rng)) for number in range(60)]
    found = outcomes(epd, (about(part) for part in parts))
    for outcome, part in zip(found, parts, strict=True):
        check_status(outcome, part)
    assert sum(isinstance(outcome, MMServeError) for outcome in found) > 30
    assert epd.worker_pids() == workers


@pytest.mark.slow
def test_no_body_of_500_leaks_anything(tmp_path: Path) -> None:
    """R14: 500 garbage images, videos and JSON over HTTP: no address, path, library or traceback."""
    rng = random.Random(500)
    with serving(tmp_path) as server:
        for number in range(500):
            if number % 5 == 4:
                text = "".join(
                    rng.choices('{}[]",:\\ntrue0123\x00é' + string.ascii_letters, k=rng.randrange(200))
                )
                response = httpx.post(
                    f"{server.url}/v1/chat/completions",
                    content=('{"messages": ' + text).encode(),
                    timeout=120,
                    trust_env=False,
                )
            else:
                response = server.ask((image_part if number % 2 else video_of)(garbage(rng)))
            assert response.status_code < 500, response.text + "".join(server.log[-20:])
            if response.status_code != 200:
                assert LEAKS.search(response.text) is None, response.text
                assert set(response.json()) == {"error"}
            assert not re.search("server:|x-powered", str(response.headers).lower())


# R15


def special_texts(llm: LLM, count: int, seed: int) -> list[str]:
    """Texts over the special tokens of the model and of others, in pieces and whole."""
    rng = random.Random(seed)
    known = [
        *llm.chat_format.tokenizer.get_added_tokens_decoder().values(),
        *("<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|vision_start|>", "<|image_pad|>", "</s>"),
    ]
    alphabet = [str(getattr(token, "content", token)) for token in known]
    pieces = [
        *alphabet,
        *(word[: len(word) // 2] for word in alphabet),
        "assistant",
        "\n",
        " ",
        "x",
        "é",
        "\0",
    ]
    return ["".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_special_tokens_in_a_text_are_text(epd: LLM, count: int) -> None:
    """R15: with and without media, 2,000 texts: never a failure of ours, no worker dies, no item too many."""
    workers = epd.worker_pids()
    picture = image_part(_saved(Image.new("RGB", (32, 32), (200, 30, 30)), "PNG"))
    conversations = [
        about(*[picture] * (number % 3), text=text)
        for number, text in enumerate(special_texts(epd, count, 15))
    ]
    found = outcomes(epd, conversations)
    for number, outcome in enumerate(found):
        if isinstance(outcome, MMServeError):
            assert isinstance(outcome, BadRequest), (conversations[number], outcome.public_message)
        else:
            assert len(outcome.media) == number % 3
    assert sum(isinstance(outcome, RequestOutput) for outcome in found) > 0.8 * count
    assert epd.worker_pids() == workers


# R16


def picture(side: int, mode: str, orientation: int) -> bytes:
    """A picture of this side; the longest one is a thin strip, which is the most that may come."""
    size = (side, side) if side < 10_000 else (side, 96)
    noise = np.random.default_rng(side).integers(0, 256, size[::-1], dtype=np.uint8)
    grey = Image.fromarray(noise)
    image = Image.fromarray(noise.astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _saved(image, "JPEG" if mode == "CMYK" else "PNG", exif=exif)


def _saved(image: Image.Image, kind: str, **more: Any) -> bytes:  # noqa: ANN401
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


GRID = [(side, mode, orientation) for side, mode in product(SIDES, MODES) for orientation in range(1, 9)]
# every side with every mode, and all orientations
QUICK = [case for number, case in enumerate(GRID) if number % 8 == (number // 8) % 8 and case[0] < 1000]


@pytest.mark.parametrize(
    "cases", [pytest.param(QUICK, id="quick"), pytest.param(GRID, id="whole", marks=pytest.mark.slow)]
)
def test_any_shape_and_mode_is_answered_or_refused(epd: LLM, cases: list[tuple[int, str, int]]) -> None:
    """R16: sides x modes x EXIF; 0 failures of ours."""
    workers = epd.worker_pids()
    found = outcomes(epd, (about(image_part(picture(*case))) for case in cases))
    for case, outcome in zip(cases, found, strict=True):
        check_status(outcome, case)
        is_refused = isinstance(outcome, MMServeError)
        assert is_refused == (case[0] < 4), case
    assert epd.worker_pids() == workers
