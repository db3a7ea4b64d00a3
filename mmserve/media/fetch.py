"""Brings media onto this host under a policy: https, data: and file: URLs, and bare paths for local users.

Knows nothing about decoding. Imports no torch, PIL or av; it runs in the API process.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import httpx

from mmserve.errors import BadRequest, Forbidden, MediaError, NotFound, TooLarge
from mmserve.media.addresses import is_public
from mmserve.media.digest import file_digest
from mmserve.media.limits import MediaLimits
from mmserve.media.store import ContentStore, StoredFile
from mmserve.request import MediaOptions, MediaRef, Modality

Resolver = Callable[[str, int], Awaitable[list[str]]]

_MAX_URL_CHARS = 8_192
_READ_BYTES = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_USERINFO = re.compile(r"[^:/?#]*:?/*[^/?#]*@")
_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(image|video)/([a-z0-9.+-]{1,64});base64,", re.IGNORECASE)
# white space and control characters, and the backslash that parsers read in different ways
_NEVER_IN_URLS = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029\ufeff]")
_HEADERS = {
    "Accept": "image/*, video/*;q=0.9, */*;q=0.5",
    "Accept-Encoding": "identity",
    "User-Agent": "mmserve",
}
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPolicy:
    """What may be fetched. `allow_private_hosts` also lifts the rule on ports: it is for tests.

    `allowed_hosts` None means every public host; `file_root` None means no file: URLs.
    """

    allow_http: bool = False
    allow_private_hosts: bool = False
    allowed_hosts: tuple[str, ...] | None = None
    file_root: Path | None = None
    max_redirects: int = 3


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a host, by the system's resolver."""
    loop = asyncio.get_running_loop()
    answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(answer[4][0]) for answer in answers]


class Fetcher:
    """Fetches media into `directory`, where a file is named by the SHA-256 of its content.

    Each `fetch` holds its file until `release`. The name in a URL is resolved once per hop, every
    answer must be public, and the connection goes to the address that was checked.
    """

    def __init__(
        self,
        policy: FetchPolicy | None = None,
        limits: MediaLimits | None = None,
        directory: str | Path = ".",
        *,
        resolver: Resolver = resolve,
        transport: httpx.AsyncBaseTransport | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy or FetchPolicy()
        self._limits = limits or MediaLimits()
        self._store = ContentStore(directory)
        self._resolver = resolver
        self._transport = transport
        self._tls = tls

    async def fetch(self, url: str, modality: Modality, options: MediaOptions | None = None) -> MediaRef:
        """Bring what a URL names onto this host, or raise what is wrong with it."""
        scheme = url[:6].lower()
        if scheme.startswith("data:"):
            stored, source = await self._in_thread(self._store_data, url, modality)
        elif scheme.startswith("file:"):
            stored, source = await self._in_thread(self._store_file, url, modality)
        else:
            stored, source = await self._download(url, modality)
        return MediaRef(
            modality=modality,
            path=str(stored.path),
            digest=stored.digest,
            source=source,
            options=options or MediaOptions(),
        )

    async def _in_thread(
        self, store: Callable[[str, Modality], tuple[StoredFile, str]], url: str, modality: Modality
    ) -> tuple[StoredFile, str]:
        """Run in a thread; when the caller is cancelled meanwhile, what was stored is let go of."""
        task = asyncio.ensure_future(asyncio.to_thread(store, url, modality))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._abandon)
            raise

    def _abandon(self, task: asyncio.Future[tuple[StoredFile, str]]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._store.release(task.result()[0].path)

    def local(
        self, path: str | Path, modality: Modality | None = None, options: MediaOptions | None = None
    ) -> MediaRef:
        """Refer to a file of the user who runs this process; it stays where it is."""
        return local_media(path, modality, options)

    def release(self, ref: MediaRef) -> None:
        """Let go of a fetched file; the last holder's release deletes it."""
        self._store.release(ref.path)

    def resolve(
        self, source: str, modality: Modality | None = None, options: MediaOptions | None = None
    ) -> MediaRef:
        """A URL or a bare path, for local users without an event loop: `file:` URLs name their own files."""
        if source[:5].lower() == "file:" and self._policy.file_root is None:
            return local_media(unquote(_file_path(source)), modality, options)
        if _URL.match(source) is None:
            return local_media(source, modality, options)
        # a thread of its own, because this one may already run an event loop (a notebook)
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(asyncio.run, self.fetch(source, modality or _guess(source), options)).result()

    def _store_data(self, url: str, modality: Modality) -> tuple[StoredFile, str]:
        match = _DATA_URL.match(url)
        if match is None:
            raise BadRequest(
                "Expected a data: URL of the form data:image/png;base64,..., but got another form"
            )
        kind, subtype = match[1].lower(), match[2].lower()
        if kind != modality:
            raise BadRequest(f"Expected a data: URL of type {modality}, but got {kind}")
        max_bytes = self._limits.max_bytes(modality)
        encoded = len(url) - match.end()
        if encoded > (max_bytes + 2) // 3 * 4:
            raise TooLarge(f"Expected at most {max_bytes} bytes of media, but got about {encoded * 3 // 4}")
        try:
            data = base64.b64decode(url[match.end() :].encode("ascii"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest("Expected base64 in the data: URL, but got something else") from error
        with self._store.incoming(max_bytes) as file:
            file.write(data)
            return file.finish(), f"data:{kind}/{subtype}"

    def _store_file(self, url: str, modality: Modality) -> tuple[StoredFile, str]:
        root = self._policy.file_root
        if root is None:
            raise Forbidden("file: URLs are not allowed here")
        quoted = _file_path(url)
        max_bytes = self._limits.max_bytes(modality)
        with _open_under(root, unquote(quoted)) as source, self._store.incoming(max_bytes) as file:
            while part := source.read(_READ_BYTES):
                file.write(part)
            return file.finish(), f"file://{quoted}"

    async def _download(self, url: str, modality: Modality) -> tuple[StoredFile, str]:
        timeout_s = self._limits.max_fetch_s(modality)
        try:
            async with asyncio.timeout(timeout_s):
                parsed = self._parse(url)
                stored = await self._follow(parsed, modality)
                return stored, f"{parsed.scheme}://{parsed.netloc.decode()}{parsed.path}"
        except TimeoutError as error:
            raise MediaError(
                f"Expected the media to arrive within {timeout_s:g} s, but it took longer"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise MediaError("The media could not be fetched from its host") from error

    async def _follow(self, url: httpx.URL, modality: Modality) -> StoredFile:
        for _ in range(self._policy.max_redirects + 1):
            address, headers, extensions = await self._address(url)
            async with (
                self._client() as client,
                client.stream(
                    "GET", url.copy_with(host=address), headers=headers, extensions=extensions
                ) as response,
            ):
                if response.status_code not in _REDIRECTS:
                    return await self._receive(response, modality)
                url = self._next_hop(url, response.headers)
        raise MediaError(f"Expected at most {self._policy.max_redirects} redirects, but got more")

    def _client(self) -> httpx.AsyncClient:
        """One per connection: a pool would share connections by address, whatever name was verified."""
        if self._tls is None:
            self._tls = httpx.create_ssl_context()
        return httpx.AsyncClient(
            trust_env=False,  # proxies of the environment would undo the choice of address
            follow_redirects=False,
            transport=self._transport,
            verify=self._tls,
            timeout=None,  # noqa: S113 - one deadline covers the whole fetch
            headers=_HEADERS,
        )

    async def _address(self, url: httpx.URL) -> tuple[str, dict[str, str], dict[str, str]]:
        """A checked address to dial, and the headers and TLS name that stay those of the URL."""
        port = url.port or _DEFAULT_PORTS[url.scheme]
        host = url.raw_host.decode("ascii")
        try:
            addresses = await self._resolver(host, port)
        except (OSError, UnicodeError) as error:
            raise MediaError("The media's host name has no address") from error
        if not addresses:
            raise MediaError("The media's host name has no address")
        if not self._policy.allow_private_hosts and not all(is_public(address) for address in addresses):
            raise Forbidden("The media's host is not on the public internet")
        return addresses[0], {"Host": url.netloc.decode("ascii")}, {"sni_hostname": host}

    def _parse(self, url: str) -> httpx.URL:
        """The one parser: what it returns is both what is judged and what is dialled."""
        if len(url) > _MAX_URL_CHARS:
            raise BadRequest(f"Expected a URL of at most {_MAX_URL_CHARS} characters, but got {len(url)}")
        if _NEVER_IN_URLS.search(url):
            raise BadRequest("Expected a URL without white space, control characters or backslashes")
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError, UnicodeError) as error:
            raise BadRequest("Expected a URL that can be read, but got something else") from error
        schemes = ("https", "http") if self._policy.allow_http else ("https",)
        if parsed.scheme not in schemes:
            raise BadRequest(
                f"Expected a URL of scheme {' or '.join(schemes)}, data or file, but got another"
            )
        if _USERINFO.match(url):
            raise BadRequest("Expected a URL without a user name or password")
        host = parsed.raw_host.decode("ascii")
        if not host or "%" in host:
            raise BadRequest("Expected a URL with a host name")
        if not self._policy.allow_private_hosts and parsed.port not in (None, 80, 443):
            raise Forbidden("Expected a URL on port 80 or 443")
        if (
            self._policy.allowed_hosts is not None
            and host.rstrip(".").lower() not in self._policy.allowed_hosts
        ):
            raise Forbidden("The media's host is not among the allowed hosts")
        return parsed

    def _next_hop(self, url: httpx.URL, headers: Mapping[str, str]) -> httpx.URL:
        location = headers.get("location", "")
        if not location or len(location) > _MAX_URL_CHARS or _NEVER_IN_URLS.search(location):
            raise MediaError("The media's host redirects to nowhere")
        hop = self._parse(str(url.join(location)))
        if url.scheme == "https" and hop.scheme != "https":
            raise Forbidden("The media's host redirects from https to http")
        return hop

    async def _receive(self, response: httpx.Response, modality: Modality) -> StoredFile:
        if response.status_code != 200:
            raise MediaError(f"Expected status 200 from the media's host, but got {response.status_code}")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise MediaError("Expected media without content encoding, but got it compressed")
        max_bytes = self._limits.max_bytes(modality)
        promised = response.headers.get("content-length", "")
        if promised.isascii() and promised.isdigit() and (len(promised) > 18 or int(promised) > max_bytes):
            raise TooLarge(f"Expected at most {max_bytes} bytes of media, but the host announces more")
        with self._store.incoming(max_bytes) as file:
            async for part in response.aiter_raw(_READ_BYTES):
                file.write(part)
            return file.finish()


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


def _file_path(url: str) -> str:
    """The path of a file: URL, still quoted."""
    match = re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/)[^?#]*)", url, re.IGNORECASE | re.DOTALL)
    if match is None or "\x00" in unquote(match[1]):
        raise BadRequest("Expected a file: URL of the form file:///absolute/path, but got another form")
    return match[1]


def _open_under(root: Path, path: str) -> BinaryIO:
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


def _guess(url: str) -> Modality:
    """Image or video, by the type in a data: URL, else by the end of the path."""
    match = _DATA_URL.match(url)
    if match is not None:
        return "video" if match[1].lower() == "video" else "image"
    return sniff(b"", Path(url.split("?")[0].split("#")[0]).suffix)


_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
_VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".ts", ".mts", ".m2ts", ".avi", ".3gp"})


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
