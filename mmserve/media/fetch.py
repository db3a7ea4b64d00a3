"""Brings media onto this host under a policy: https, data: and file: URLs, and bare paths for local users.

Knows nothing about decoding. Imports no torch, PIL or av; it runs in the API process.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import httpx

from mmserve.errors import BadRequest, Forbidden, MediaError, MMServeError, TooLarge
from mmserve.media.addresses import is_public
from mmserve.media.data_url import modality_of, read_data_url
from mmserve.media.framelist import SUFFIX, check_count, frames_media, save_pictures
from mmserve.media.limits import MediaLimits
from mmserve.media.local import file_url_path, local_media, open_under, sniff
from mmserve.media.store import ContentStore, StoredFile
from mmserve.request import MediaOptions, MediaRef, Modality

Resolver = Callable[[str, int], Awaitable[list[str]]]

_MAX_URL_CHARS = 8_192
_READ_BYTES = 1 << 16
_FRAMES_AT_ONCE = 8
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_USERINFO = re.compile(r"[^:/?#]*:?/*[^/?#]*@")
_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)
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

    Each `fetch` holds its file until `release`; all that is held or on its way has `max_held_bytes`
    together, then comes Overloaded. The name in a URL is resolved once per hop, every answer must be
    public, and the connection goes to the address that was checked.
    """

    def __init__(
        self,
        policy: FetchPolicy | None = None,
        limits: MediaLimits | None = None,
        directory: str | Path = ".",
        *,
        max_held_bytes: int | None = None,
        resolver: Resolver = resolve,
        transport: httpx.AsyncBaseTransport | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy or FetchPolicy()
        self.limits = limits or MediaLimits()
        self.store = ContentStore(directory, max_held_bytes)
        self._resolver = resolver
        self._transport = transport
        self._tls = tls

    async def fetch(
        self,
        url: str,
        modality: Modality,
        options: MediaOptions | None = None,
        fps: float | None = None,
    ) -> MediaRef:
        """Bring what a URL names onto this host, or raise what is wrong with it.

        `fps` is the rate of a URL that holds frames one by one.
        """
        scheme = url[:6].lower()
        if scheme.startswith("data:"):
            stored, source = await self._in_thread(lambda: self._store_data(url, modality))
        elif scheme.startswith("file:"):
            stored, source = await self._in_thread(lambda: self._store_file(url, modality))
        else:
            stored, source = await self._download(url, modality)
        if stored.path.suffix == SUFFIX:
            return frames_media(stored, source, options, fps)
        return MediaRef(
            modality=modality,
            path=str(stored.path),
            digest=stored.digest,
            source=source,
            options=options or MediaOptions(),
        )

    async def fetch_frames(
        self, urls: Sequence[str], options: MediaOptions | None = None, fps: float | None = None
    ) -> MediaRef:
        """Images as the frames of one video, fetched a few at a time within the limits of one video."""
        check_count(len(urls), self.limits)
        async with self._timed("video"), self._pictures(urls) as paths:
            stored, _ = await self._in_thread(
                lambda: (save_pictures(paths, self.store, self.limits), "frames")
            )
        return frames_media(stored, "frames", options, fps)

    @asynccontextmanager
    async def _pictures(self, urls: Sequence[str]) -> AsyncIterator[list[Path]]:
        """The files of images in their order, held as long as the context lasts."""
        gate = asyncio.Semaphore(_FRAMES_AT_ONCE)
        found: dict[int, MediaRef] = {}
        received = 0

        async def one(number: int, url: str) -> None:
            nonlocal received
            async with gate:
                try:
                    found[number] = await self.fetch(url, "image")
                except MMServeError as error:
                    raise type(error)(f"Frame {number} of the video: {error.public_message}") from error
            received += self.store.size(found[number].path)
            if received > self.limits.max_video_bytes:
                raise TooLarge(
                    f"Expected at most {self.limits.max_video_bytes} bytes of frames, but got more"
                )

        try:
            async with asyncio.TaskGroup() as group:
                for number, url in enumerate(urls):
                    group.create_task(one(number, url))
            yield [Path(found[number].path) for number in range(len(urls))]
        except ExceptionGroup as errors:
            # all but the first were cancelled, or came in the same moment
            raise errors.exceptions[0] from errors
        finally:
            for ref in found.values():
                self.release(ref)

    async def _in_thread(self, store: Callable[[], tuple[StoredFile, str]]) -> tuple[StoredFile, str]:
        """Run in a thread; when the caller is cancelled meanwhile, what was stored is let go of."""
        task = asyncio.ensure_future(asyncio.to_thread(store))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._abandon)
            raise

    def _abandon(self, task: asyncio.Future[tuple[StoredFile, str]]) -> None:
        if not task.cancelled() and task.exception() is None:
            self.store.release(task.result()[0].path)

    def local(
        self, path: str | Path, modality: Modality | None = None, options: MediaOptions | None = None
    ) -> MediaRef:
        """Refer to a file of the user who runs this process; it stays where it is."""
        return local_media(path, modality, options)

    def release(self, ref: MediaRef) -> None:
        """Let go of a fetched file; the last holder's release deletes it."""
        self.store.release(ref.path)

    def resolve(
        self,
        source: str,
        modality: Modality | None = None,
        options: MediaOptions | None = None,
        fps: float | None = None,
    ) -> MediaRef:
        """A URL or a bare path, for local users without an event loop: `file:` URLs name their own files."""
        if source[:5].lower() == "file:" and self._policy.file_root is None:
            return local_media(unquote(file_url_path(source)), modality, options)
        if _URL.match(source) is None:
            return local_media(source, modality, options)
        wanted = self.fetch(source, modality or _guess(source), options, fps)
        # a thread of its own, because this one may already run an event loop (a notebook)
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(asyncio.run, wanted).result()

    def _store_data(self, url: str, modality: Modality) -> tuple[StoredFile, str]:
        read = read_data_url(url, modality, self.limits)
        if read.is_list:
            return save_pictures(read.pieces, self.store, self.limits), read.source
        (data,) = read.pieces
        with self.store.incoming(self.limits.max_bytes(modality), expected=len(data)) as file:
            file.write(data)
            return file.finish(), read.source

    def _store_file(self, url: str, modality: Modality) -> tuple[StoredFile, str]:
        root = self._policy.file_root
        if root is None:
            raise Forbidden("file: URLs are not allowed here")
        quoted = file_url_path(url)
        max_bytes = self.limits.max_bytes(modality)
        with (
            open_under(root, unquote(quoted)) as source,
            self.store.incoming(max_bytes) as file,
        ):
            while part := source.read(_READ_BYTES):
                file.write(part)
            return file.finish(), f"file://{quoted}"

    async def _download(self, url: str, modality: Modality) -> tuple[StoredFile, str]:
        try:
            async with self._timed(modality):
                parsed = self._parse(url)
                stored = await self._follow(parsed, modality)
                return stored, f"{parsed.scheme}://{parsed.netloc.decode()}{parsed.path}"
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise MediaError("The media could not be fetched from its host") from error

    @asynccontextmanager
    async def _timed(self, modality: Modality) -> AsyncIterator[None]:
        limit_s = self.limits.max_fetch_s(modality)
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError as error:
            raise MediaError(
                f"Expected the media to arrive within {limit_s:g} s, but it took longer"
            ) from error

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
        max_bytes = self.limits.max_bytes(modality)
        promised = response.headers.get("content-length", "")
        if promised.isascii() and promised.isdigit() and (len(promised) > 18 or int(promised) > max_bytes):
            raise TooLarge(f"Expected at most {max_bytes} bytes of media, but the host announces more")
        known = int(promised) if promised.isascii() and promised.isdigit() else 0
        with self.store.incoming(max_bytes, expected=known) as file:
            async for part in response.aiter_raw(_READ_BYTES):
                file.write(part)
            return file.finish()


def _guess(url: str) -> Modality:
    """Image or video, by the type in a data: URL, else by the end of the path."""
    return modality_of(url) or sniff(b"", Path(url.split("?")[0].split("#")[0]).suffix)
