"""Reads data: URLs: `data:image/png;base64,...`, and `data:video/jpeg;base64,f1,f2,...` as vLLM takes frames.

Knows nothing about files or decoding.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import NamedTuple

from mmserve.errors import BadRequest, TooLarge
from mmserve.media.framelist import check_count
from mmserve.media.limits import MediaLimits
from mmserve.request import Modality

_FORM = re.compile(r"data:(image|video)/([a-z0-9.+-]{1,64});base64,", re.IGNORECASE)
_ANIMATIONS = frozenset({"image/gif", "image/webp"})
_FRAMES = "video/jpeg"


class DataUrl(NamedTuple):
    """`pieces` are one file, or the pictures of a video when `is_list`."""

    media_type: str
    pieces: tuple[bytes, ...]
    is_list: bool

    @property
    def source(self) -> str:
        return f"data:{self.media_type}"


def read_data_url(url: str, modality: Modality, limits: MediaLimits) -> DataUrl:
    """Decode a data: URL that stands for an image or a video; sizes are judged before."""
    match = _FORM.match(url)
    if match is None:
        raise BadRequest("Expected a data: URL of the form data:image/png;base64,..., but got another form")
    kind, subtype = match[1].lower(), match[2].lower()
    media_type = f"{kind}/{subtype}"
    if kind != modality and not (modality == "video" and media_type in _ANIMATIONS):
        raise BadRequest(f"Expected a data: URL of type {modality}, but got {kind}")
    max_bytes = limits.max_bytes(modality)
    encoded = len(url) - match.end()
    if media_type != _FRAMES:
        if encoded > (max_bytes + 2) // 3 * 4:
            raise TooLarge(f"Expected at most {max_bytes} bytes of media, but got about {encoded * 3 // 4}")
        return DataUrl(media_type, (_decoded(url[match.end() :], "the data: URL"),), is_list=False)
    count = url.count(",", match.end()) + 1
    check_count(count, limits)
    if encoded > (max_bytes + 2) // 3 * 4 + 4 * count:
        raise TooLarge(f"Expected at most {max_bytes} bytes of frames, but got about {encoded * 3 // 4}")
    texts = url[match.end() :].split(",")
    pieces = tuple(_decoded(text, f"frame {number} of the data: URL") for number, text in enumerate(texts))
    for number, piece in enumerate(pieces):
        if not piece:
            raise BadRequest(f"Expected frame {number} of the data: URL, but it is empty")
    return DataUrl(media_type, pieces, is_list=True)


def modality_of(url: str) -> Modality | None:
    """What a data: URL says that it is; None for other URLs."""
    match = _FORM.match(url)
    if match is None:
        return None
    return "video" if match[1].lower() == "video" else "image"


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"Expected base64 in {where}, but got something else") from error
