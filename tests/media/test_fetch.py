"""Fetching: what is stored, byte and time budgets, data: and file: URLs, local paths (R10, R14)."""

from __future__ import annotations

import asyncio
import base64
import gzip
import time
from pathlib import Path

import psutil
import pytest

from mmserve.config import Limits
from mmserve.errors import BadRequest, Forbidden, MediaError, MMServeError, NotFound, TooLarge
from mmserve.media.fetch import Fetcher, FetchPolicy
from mmserve.media.limits import MediaLimits
from mmserve.media.local import sniff
from mmserve.request import MediaOptions, MediaRef
from tests.media.web import (
    DIGEST,
    LIMITS,
    PNG,
    Handler,
    Page,
    Site,
    get,
    leftovers,
    resolver,
    serving,
)


def test_a_fetched_file_is_named_by_its_content(tmp_path: Path) -> None:
    site = Site()
    fetcher = Fetcher(
        FetchPolicy(), LIMITS, tmp_path, resolver=resolver(["93.184.216.34"]), transport=site.transport()
    )
    ref = get(fetcher, "https://example.org/a.png?token=secret#part", MediaOptions(num_frames=3))
    assert (ref.digest, ref.path) == (DIGEST, str(tmp_path / DIGEST))
    assert Path(ref.path).read_bytes() == PNG
    assert ref.source == "https://example.org/a.png"
    assert ref.options == MediaOptions(num_frames=3)
    assert leftovers(tmp_path) == [DIGEST]


def test_the_checked_address_is_dialled_under_the_name_of_the_url(tmp_path: Path) -> None:
    site = Site()
    fetcher = Fetcher(
        FetchPolicy(),
        LIMITS,
        tmp_path,
        resolver=resolver(["2606:4700:4700::1111"]),
        transport=site.transport(),
    )
    get(fetcher, "https://bücher.example:443/a.png")
    (request,) = site.requests
    assert request.url.host == "2606:4700:4700::1111"
    assert request.headers["host"] == "xn--bcher-kva.example"
    assert request.extensions["sni_hostname"] == "xn--bcher-kva.example"
    assert request.headers["accept-encoding"] == "identity"


def test_files_stay_until_their_last_holder_lets_go(tmp_path: Path) -> None:
    site = Site()
    fetcher = Fetcher(
        FetchPolicy(), LIMITS, tmp_path, resolver=resolver(["1.1.1.1"]), transport=site.transport()
    )
    first, second = get(fetcher, "https://a.example/1"), get(fetcher, "https://b.example/2")
    fetcher.release(first)
    assert Path(second.path).exists()
    fetcher.release(second)
    fetcher.release(second)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ((404, {}, b"secret page"), MediaError),
        ((200, {"content-length": "100001"}, b""), TooLarge),
        ((200, {"content-length": "9" * 40}, b""), TooLarge),
        ((200, {}, b"x" * 100_001), TooLarge),
        ((200, {"content-length": "5"}, b"x" * 100_001), TooLarge),
        ((200, {"content-encoding": "gzip"}, b"bomb"), MediaError),
        ((302, {}, b""), MediaError),
    ],
)
def test_unwanted_answers_leave_nothing(tmp_path: Path, response: Page, error: type[MMServeError]) -> None:
    """R10: sizes are judged by the header and on the fly, whichever says more."""
    site = Site({"/x": response})
    fetcher = Fetcher(
        FetchPolicy(), LIMITS, tmp_path, resolver=resolver(["1.1.1.1"]), transport=site.transport()
    )
    with pytest.raises(error) as caught:
        get(fetcher, "https://a.example/x")
    assert "secret" not in caught.value.public_message
    assert leftovers(tmp_path) == []


def test_a_body_exactly_at_the_limit_passes(tmp_path: Path) -> None:
    site = Site({"/x": (200, {}, b"x" * 100_000)})
    fetcher = Fetcher(
        FetchPolicy(), LIMITS, tmp_path, resolver=resolver(["1.1.1.1"]), transport=site.transport()
    )
    assert Path(get(fetcher, "https://a.example/x").path).stat().st_size == 100_000


async def _fetch_from(handler: Handler, limits: MediaLimits, directory: Path) -> MediaRef:
    fetcher = Fetcher(FetchPolicy(allow_http=True, allow_private_hosts=True), limits, directory)
    async with serving(handler) as port:
        return await fetcher.fetch(f"http://127.0.0.1:{port}/x.png", "image")


def endless(part: bytes, pause_s: float) -> Handler:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await writer.drain()
                await asyncio.sleep(pause_s)
        except ConnectionError:
            writer.close()

    return answer


@pytest.mark.parametrize(
    "max_bytes", [100_000, pytest.param(Limits().max_image_bytes, marks=pytest.mark.slow)]
)
def test_an_endless_body_stops_at_the_byte_budget(tmp_path: Path, max_bytes: int) -> None:
    """R10: chunks without an end; they pass through memory, which grows by less than 10 MB."""
    limits = MediaLimits(max_image_bytes=max_bytes, max_image_fetch_s=30.0)
    before = psutil.Process().memory_info().rss
    with pytest.raises(TooLarge):
        asyncio.run(_fetch_from(endless(b"x" * 10_000, 0), limits, tmp_path))
    assert psutil.Process().memory_info().rss - before < 10e6
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("limit_s", "slack_s"),
    [(0.2, 5.0), pytest.param(Limits().max_image_fetch_s, 0.1, marks=pytest.mark.slow)],
)
def test_a_dripping_body_stops_at_the_time_budget(tmp_path: Path, limit_s: float, slack_s: float) -> None:
    """R10: a byte now and then; given up 100 ms after the budget at the latest."""

    async def timed() -> float:
        began = time.perf_counter()
        with pytest.raises(MediaError, match=f"within {limit_s:g} s"):
            await _fetch_from(endless(b"x", 0.01), MediaLimits(max_image_fetch_s=limit_s), tmp_path)
        return time.perf_counter() - began

    assert asyncio.run(timed()) < limit_s + slack_s
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("stage", ["connected", "head"])
def test_a_silent_host_is_given_up_at_the_time_budget(tmp_path: Path, stage: str) -> None:
    """R10: no answer at all, or one that stops in its headers."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if stage == "head":
            writer.write(b"HTTP/1.1 200 OK\r\nx: ")
        await asyncio.sleep(60)

    with pytest.raises(MediaError, match=r"within 0\.2 s"):
        asyncio.run(_fetch_from(silent, MediaLimits(max_image_fetch_s=0.2), tmp_path))
    assert leftovers(tmp_path) == []


def test_a_body_compressed_into_nothing_is_not_unpacked(tmp_path: Path) -> None:
    """R10: identity is asked for, and a bomb that comes all the same is refused by its header."""
    asked: list[bytes] = []
    bomb = gzip.compress(bytes(10_000_000))

    async def packed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)
        writer.write(head + bomb)
        await writer.drain()

    with pytest.raises(MediaError, match="without content encoding"):
        asyncio.run(_fetch_from(packed, LIMITS, tmp_path))
    assert b"accept-encoding: identity" in asked[0].lower()
    assert leftovers(tmp_path) == []


def test_proxies_of_the_environment_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (len(PNG), PNG)
        )
        await writer.drain()
        writer.close()

    assert asyncio.run(_fetch_from(answer, LIMITS, tmp_path)).digest == DIGEST


def test_data_urls_are_stored(tmp_path: Path) -> None:
    fetcher = Fetcher(FetchPolicy(), LIMITS, tmp_path)
    ref = get(fetcher, "data:image/png;base64," + base64.b64encode(PNG).decode())
    assert (ref.digest, ref.source) == (DIGEST, "data:image/png")
    exact = base64.b64encode(b"x" * LIMITS.max_image_bytes).decode()
    assert Path(get(fetcher, f"data:image/webp;base64,{exact}").path).stat().st_size == LIMITS.max_image_bytes


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("data:image/png;base64,***", BadRequest),
        ("data:video/jpeg;base64,QUFB,QUFB", BadRequest),
        ("data:image/png,plain", BadRequest),
        ("data:image/png;base64,ä", BadRequest),
        ("data:video/mp4;base64,QUFB", BadRequest),  # asked for as an image
        ("data:image/png;base64," + "A" * 140_000, TooLarge),
    ],
)
def test_other_data_urls_are_refused(tmp_path: Path, url: str, error: type[MMServeError]) -> None:
    with pytest.raises(error):
        get(Fetcher(FetchPolicy(), LIMITS, tmp_path), url)
    assert leftovers(tmp_path) == []


def test_file_urls_stay_under_their_root(tmp_path: Path) -> None:
    root, outside, store = tmp_path / "media root", tmp_path / "outside", tmp_path / "store"
    for folder in (root, outside, store):
        folder.mkdir()
    (root / "a.png").write_bytes(PNG)
    (outside / "b.png").write_bytes(PNG)
    (root / "link.png").symlink_to(outside / "b.png")
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "loop").symlink_to(root / "loop")
    (root / "big.png").write_bytes(b"x" * (LIMITS.max_image_bytes + 1))
    fetcher = Fetcher(FetchPolicy(file_root=root), LIMITS, store)
    quoted = str(root).replace(" ", "%20")
    for url in (f"file://{quoted}/a.png", f"file://localhost{quoted}/a.png", f"file:{quoted}/inner.png"):
        assert get(fetcher, url).digest == DIGEST
    for name in (
        "link.png",
        "../outside/b.png",
        "%2e%2e/outside/b.png",
        "missing.png",
        "loop",
        "",
        "a.png/x",
    ):
        with pytest.raises(Forbidden, match="under the allowed root"):
            get(fetcher, f"file://{quoted}/{name}")
    for bad in (
        "file://other.host/a.png",
        "file:a.png",
        f"file://{quoted}/a%00.png",
        f"file://{quoted}/a.png?x",
    ):
        with pytest.raises(BadRequest):
            get(fetcher, bad)
    with pytest.raises(TooLarge):
        get(fetcher, f"file://{quoted}/big.png")
    with pytest.raises(Forbidden, match="not allowed here"):
        get(Fetcher(FetchPolicy(), LIMITS, store), f"file://{quoted}/a.png")


def test_local_paths_are_used_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "picture.bin"
    path.write_bytes(PNG)
    fetcher = Fetcher(directory=tmp_path)
    ref = fetcher.local(path, options=MediaOptions(fps=1))
    assert (ref.modality, ref.path, ref.digest, ref.options.fps) == ("image", str(path), DIGEST, 1)
    assert fetcher.resolve(str(path)) == fetcher.resolve(f"file://{path}")
    fetcher.release(ref)
    assert path.exists()
    with pytest.raises(NotFound):
        fetcher.local(tmp_path / "missing.mp4")
    with pytest.raises(BadRequest):
        fetcher.local(tmp_path)


def test_resolve_fetches_urls_from_anywhere(tmp_path: Path) -> None:
    site = Site()
    fetcher = Fetcher(None, LIMITS, tmp_path, resolver=resolver(["1.1.1.1"]), transport=site.transport())

    async def from_a_running_loop() -> MediaRef:
        return fetcher.resolve("https://a.example/x.png")

    assert asyncio.run(from_a_running_loop()).modality == "image"
    assert fetcher.resolve("https://a.example/x.mp4?x=1").modality == "video"
    assert fetcher.resolve("data:video/mp4;base64,QUFB").modality == "video"


@pytest.mark.parametrize(
    ("head", "suffix", "expected"),
    [
        (b"\xff\xd8\xff\xe0", ".mp4", "image"),
        (b"GIF89a", "", "image"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "", "image"),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "", "video"),
        (b"\x00\x00\x00\x18ftypisom", "", "video"),
        (b"\x1a\x45\xdf\xa3", ".png", "video"),
        ((b"\x47" + bytes(187)) * 3, "", "video"),
        (b"unknown", ".JPEG", "image"),
        (b"unknown", ".mkv", "video"),
    ],
)
def test_modality_is_told_by_content_then_by_name(head: bytes, suffix: str, expected: str) -> None:
    assert sniff(head, suffix) == expected


def test_anything_else_has_no_modality() -> None:
    with pytest.raises(MediaError, match="Expected an image"):
        sniff(b"%PDF-1.7", ".pdf")
