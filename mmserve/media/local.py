"""Files that are on this host already: those of a local user, and those below a root that clients may name.

Knows nothing about fetching or decoding.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from mmserve.errors import BadRequest, Forbidden, MediaError, NotFound
from mmserve.media.digest import file_digest
from mmserve.request import MediaOptions, MediaRef, Modality

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
_VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".ts", ".mts", ".m2ts", ".avi", ".3gp"})


def local_media(
    path: str | Path, modality: Modality | None = None, options: MediaOptions | None = None
) -> MediaRef:
    """Refer to a file by its path, for the user whose process this is; image or video by its first bytes."""
    try:
        found = Path(path).expanduser().resolve(strict=True)
        if not found.is_file():
            raise BadRequest(f"Expected a media file, but {path} is something else")
        with open(found, "rb") as file:
            head = file.read(512)
        digest = file_digest(found)
    except FileNotFoundError as error:
        raise NotFound(f"There is no file {path}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"The file {path} cannot be read") from error
    return MediaRef(
        modality=modality or sniff(head, found.suffix),
        path=str(found),
        digest=digest,
        source=str(path),
        options=options or MediaOptions(),
    )


def file_url_path(url: str) -> str:
    """The path of a file: URL, still quoted."""
    match = re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/)[^?#]*)", url, re.IGNORECASE | re.DOTALL)
    if match is None or "\x00" in unquote(match[1]):
        raise BadRequest("Expected a file: URL of the form file:///absolute/path, but got another form")
    return match[1]


def open_under(root: Path, path: str) -> BinaryIO:
    """Open a regular file under `root`; what was opened is judged, not what the path named before."""
    refused = Forbidden("The file: URL does not name a file under the allowed root")
    try:
        inside = root.resolve(strict=True)
        fd = os.open(
            Path(path).resolve(strict=True), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise refused from error
    opened = Path(os.readlink(f"/proc/self/fd/{fd}"))
    if not opened.is_relative_to(inside) or not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise refused
    return os.fdopen(fd, "rb")


def sniff(head: bytes, suffix: str = "") -> Modality:
    """Image or video, by the first bytes of a file, else by its name."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")):
        return "image"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image"
    is_riff_video = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    is_transport = head[:1] == b"\x47" and head[188:189] == b"\x47" and head[376:377] == b"\x47"
    is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    if is_riff_video or is_transport or is_mp4 or head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video"
    if suffix.lower() in _IMAGE_SUFFIXES:
        return "image"
    if suffix.lower() in _VIDEO_SUFFIXES:
        return "video"
    raise MediaError("Expected an image (JPEG, PNG, WebP, GIF) or a video (MP4, Matroska, TS, AVI)")
