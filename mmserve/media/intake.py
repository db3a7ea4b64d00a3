"""Brings what a conversation's media parts name onto this host: URLs, lists of pictures, media sent before.

Knows nothing about decoding or about requests; whoever asked for an item releases it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from mmserve.conversation import MediaPart
from mmserve.errors import BadRequest
from mmserve.media.arrays import save_frames
from mmserve.media.fetch import Fetcher
from mmserve.media.framelist import Picture, frames_media, save_pictures
from mmserve.media.remembered import RememberedMedia
from mmserve.request import MediaRef


class Intake:
    """`bring` is for clients over HTTP, `resolve` for the user of this process."""

    def __init__(self, fetcher: Fetcher, max_remembered_bytes: int) -> None:
        self._fetcher = fetcher
        self._store = fetcher.store
        self._remembered = RememberedMedia(fetcher.store, max_remembered_bytes)

    async def bring(self, part: MediaPart, salt: str = "") -> MediaRef:
        """Fetch one item under the policy, or find it; it is held until `release`."""
        if part.content is None:
            return self._find(part, salt)
        if isinstance(part.content, str):
            ref = await self._fetcher.fetch(part.content, part.modality, part.options, part.fps)
        else:
            ref = await self._fetcher.fetch_frames(part.content, part.options, part.fps)
        return self._noted(part, ref, salt)

    def resolve(self, part: MediaPart) -> MediaRef:
        """The same for paths, PIL images and arrays too, and for file: URLs of any place."""
        content = part.content
        if content is None:
            return self._find(part, "")
        if isinstance(content, str | Path):
            ref = self._fetcher.resolve(str(content), part.modality, part.options, part.fps)
        elif isinstance(content, tuple):
            ref = self._frames(content, part)
        else:
            ref = save_frames(_pixels(content), self._store, part.modality, part.fps)
            ref = msgspec.structs.replace(ref, options=part.options)
        return self._noted(part, ref, "")

    def release(self, ref: MediaRef) -> None:
        self._fetcher.release(ref)

    def held_bytes(self) -> dict[str, int]:
        """Files of requests, and files that are only remembered."""
        return {"media": self._store.held_bytes, "remembered": self._remembered.total_bytes}

    def _noted(self, part: MediaPart, ref: MediaRef, salt: str) -> MediaRef:
        if part.uuid is not None:
            self._remembered.remember(salt, part.uuid, ref)
        return ref

    def _find(self, part: MediaPart, salt: str) -> MediaRef:
        """An item sent before, sampled as it is asked for now."""
        assert part.uuid is not None
        found = self._remembered.find(salt, part.uuid, part.modality)
        return msgspec.structs.replace(
            found, options=part.options, array_fps=found.array_fps and (part.fps or found.array_fps)
        )

    def _frames(self, contents: Sequence[object], part: MediaPart) -> MediaRef:
        held: list[MediaRef] = []
        pictures: list[Picture] = []
        try:
            for content in contents:
                if isinstance(content, str | Path):
                    held.append(self._fetcher.resolve(str(content), "image"))
                    pictures.append(Path(held[-1].path))
                else:
                    pictures.append(_pixels(content))
            stored = save_pictures(pictures, self._store, self._fetcher.limits)
        finally:
            for ref in held:
                self.release(ref)
        return frames_media(stored, "frames", part.options, part.fps)


def _pixels(content: object) -> np.ndarray:
    """An array as it is; a PIL image becomes one by itself."""
    convert = getattr(content, "convert", None)
    pixels = np.asarray(content if convert is None else convert("RGB"))
    if pixels.dtype == object:
        raise BadRequest(f"Expected a path, an image or an array, but got {type(content).__name__}")
    return pixels
