"""Media of every kind, honest and hostile, made on the spot: small to send, some of them large to decode."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.e2e.serving import data_url, image_part
from tests.media.clips import make_video, png_bomb

Part = dict[str, Any]


class Sample(NamedTuple):
    """A part of a message, the statuses it may have, and how it is sampled."""

    name: str
    part: Part
    statuses: tuple[int, ...]
    video: dict[str, Any] | None = None


def gif(frames: int, side: int) -> bytes:
    """Frames that look alike: nothing to send, all to decode."""
    file = io.BytesIO()
    images = [Image.new("P", (side, side), number % 7) for number in range(frames)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=40, optimize=False)
    return file.getvalue()


def photo(rng: random.Random, kind: str = "JPEG", side: int = 900) -> bytes:
    noise = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    size = rng.randint(8, side), rng.randint(8, side)
    Image.fromarray(noise).resize(size).save(file, kind)
    return file.getvalue()


def garbage(rng: random.Random) -> bytes:
    """Bytes that begin like a file of some kind, or a real file with damage."""
    heads = [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"RIFF\x24\0\0\0WEBPVP8 ",
        b"\0\0\0\x18ftypisom",
        b"\x1a\x45\xdf\xa3",
        b"II*\0",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x0cjP  \r\n\x87\n",
    ]
    head = rng.choice(heads)
    if rng.random() < 0.5:
        return head + rng.randbytes(rng.randrange(2000))
    whole = bytearray(photo(rng, rng.choice(["JPEG", "PNG", "WEBP", "GIF"]), 64))
    for _ in range(rng.randrange(1, 8)):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    return bytes(whole[: rng.randrange(1, len(whole) + 1)])


def video_of(data: bytes, kind: str = "video/mp4") -> Part:
    return {"type": "video_url", "video_url": {"url": data_url(kind, data)}}


class Samples:
    """Makes a mix of them; what is slow to make is made once."""

    def __init__(self, folder: Path) -> None:
        clips = [
            make_video(folder / f"clip{n}.mp4", frames=60, rate=15, size=(160 + 32 * n, 120))
            for n in range(4)
        ]
        self._clips = [clip.read_bytes() for clip in clips]
        self._long = make_video(
            folder / "long.mp4", frames=1500, rate=30, size=(320, 240), gop=250
        ).read_bytes()
        self._wide = make_video(folder / "wide.mp4", frames=48, rate=12, size=(1600, 1200)).read_bytes()
        self._bomb = png_bomb(16_000)
        self._large = png_bomb(5_700)  # within the limit of pixels
        self._gif, self._gif_bomb = gif(60, 256), gif(400, 1400)
        frame = base64.b64encode(photo(random.Random(1), "JPEG", 200)).decode()
        self._frames = "data:video/jpeg;base64," + ",".join([frame] * 48)
        self._flood = "data:video/jpeg;base64," + ",".join(["YWFh"] * 10_000)

    def of(self, rng: random.Random) -> Sample:
        made = rng.choices(self._makers(), [weight for weight, _ in WEIGHTED])[0]
        return made(rng)

    def _makers(self) -> Sequence[Callable[[random.Random], Sample]]:
        return [getattr(self, name) for _, name in WEIGHTED]

    def honest_image(self, rng: random.Random) -> Sample:
        kind = rng.choice(["JPEG", "PNG", "WEBP"])
        return Sample("image", image_part(photo(rng, kind), f"image/{kind.lower()}"), (200,))

    def honest_clip(self, rng: random.Random) -> Sample:
        # bytes behind the end change what the file is called, not what it shows
        data = rng.choice(self._clips) + rng.randbytes(rng.choice([0, 4]))
        return Sample("clip", video_of(data), (200,))

    def long_video(self, rng: random.Random) -> Sample:
        video = {"fps": rng.choice([0.5, 1, 2]), "start": rng.choice([0, 3, 10])}
        return Sample("long", video_of(self._long), (200,), video)

    def wide_video(self, rng: random.Random) -> Sample:
        return Sample("wide", video_of(self._wide), (200,), {"num_frames": rng.choice([8, 32, 48])})

    def bomb(self, rng: random.Random) -> Sample:
        return Sample("bomb", image_part(self._bomb), (422,))

    def large_image(self, rng: random.Random) -> Sample:
        return Sample("large", image_part(self._large), (200,))

    def huge_header(self, rng: random.Random) -> Sample:
        data = bytearray(png_bomb(64))
        struct.pack_into(">II", data, 16, 65_535, rng.choice([4, 65_535]))
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
        return Sample("header", image_part(bytes(data)), (422,))

    def truncated(self, rng: random.Random) -> Sample:
        if rng.random() < 0.5:
            whole = photo(rng)
            return Sample("cut image", image_part(whole[: len(whole) // 2]), (200, 422))
        whole = rng.choice([*self._clips, self._long])
        return Sample("cut video", video_of(whole[: rng.randrange(len(whole))]), (200, 422))

    def animation(self, rng: random.Random) -> Sample:
        if rng.random() < 0.5:
            return Sample("gif", video_of(self._gif, "image/gif"), (200,))
        return Sample("gif image", image_part(self._gif_bomb, "image/gif"), (200,))

    def animation_bomb(self, rng: random.Random) -> Sample:
        return Sample("gif bomb", video_of(self._gif_bomb, "image/gif"), (200, 422))

    def frame_list(self, rng: random.Random) -> Sample:
        return Sample("frames", {"type": "video_url", "video_url": {"url": self._frames}}, (200,))

    def frame_flood(self, rng: random.Random) -> Sample:
        return Sample("flood", {"type": "video_url", "video_url": {"url": self._flood}}, (422,))

    def rubbish(self, rng: random.Random) -> Sample:
        data = garbage(rng)
        part = image_part(data) if rng.random() < 0.5 else video_of(data)
        return Sample("garbage", part, (200, 422))

    def stranger(self, rng: random.Random) -> Sample:
        url = rng.choice(
            ["https://127.0.0.1/x.png", "https://169.254.169.254/", "file:///etc/passwd", "ftp://x/"]
        )
        return Sample("url", {"type": "image_url", "image_url": {"url": url}}, (400, 403, 422))


WEIGHTED = [
    *((5, "honest_image"), (5, "honest_clip"), (2, "long_video"), (1, "wide_video"), (2, "bomb")),
    *((1, "large_image"), (2, "huge_header"), (3, "truncated"), (2, "animation"), (1, "animation_bomb")),
    *((1, "frame_list"), (1, "frame_flood"), (4, "rubbish"), (1, "stranger")),
]
