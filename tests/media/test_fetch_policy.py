"""What may be fetched and what may not, with a fake resolver and a loopback canary (R9)."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from pathlib import Path

import pytest

from mmserve.conversation import MediaPart
from mmserve.errors import BadRequest, Forbidden, MediaError
from mmserve.media.fetch import Fetcher, FetchPolicy
from mmserve.media.intake import Intake
from mmserve.request import MediaRef
from tests.media.web import (
    DIGEST,
    LIMITS,
    Site,
    get,
    leftovers,
    resolver,
    serving,
    system,
)

HOSTILE = [
    *(
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0177.0.0.1/",
    ),
    *("https://0/", "https://0.0.0.0/", "https://10.0.0.1/", "https://172.16.0.1/", "https://192.168.0.1/"),
    *("https://169.254.169.254/latest/meta-data/", "https://100.100.100.200/", "https://224.0.0.1/"),
    *("https://255.255.255.255/", "https://240.0.0.1/", "https://198.18.0.1/", "https://192.0.2.1/"),
    *("https://[::1]/", "https://[::]/", "https://[::ffff:127.0.0.1]/", "https://[::127.0.0.1]/"),
    *("https://[64:ff9b::a9fe:a9fe]/", "https://[2002:7f00:1::]/", "https://[2001:0:7f00:1::]/"),
    *(
        "https://[fe80::1]/",
        "https://[fe80::1%25lo]/",
        "https://[fc00::1]/",
        "https://[fec0::1]/",
        "https://[ff02::1]/",
    ),
    *(
        "http://1.1.1.1/",
        "HTTP://1.1.1.1/",
        "https://1.1.1.1:22/",
        "https://1.1.1.1:8443/",
        "https://1.1.1.1:0/",
    ),
    *(
        "https://user@1.1.1.1/",
        "https://user:pass@1.1.1.1/",
        "https://@1.1.1.1/",
        "https://1.1.1.1@127.0.0.1/",
    ),
    *(
        "https://1.1.1.1\\@127.0.0.1/",
        "https:\\\\127.0.0.1/",
        "https://127.0.0.1%2f@1.1.1.1/",
        "https://1.1.1.1 /",
    ),
    *(
        "https://1.1.1.1\t/",
        "https://1.1.1.1/\r\nHost: x",
        "https://1.1.1.1/\x00",
        "\u2028https://1.1.1.1/",
        " https://1.1.1.1/",
    ),
    *(
        "https://",
        "https:///",
        "https:1.1.1.1",
        "https:/1.1.1.1",
        "//1.1.1.1/",
        "1.1.1.1",
        "",
        "https://[::1",
        "https://%31",
    ),
    *(
        "ftp://1.1.1.1/",
        "gopher://1.1.1.1/",
        "rtsp://1.1.1.1/",
        "jar:https://1.1.1.1!/",
        "concat:https://1.1.1.1/|x",
    ),
    *(
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file://1.1.1.1/share",
        "data:text/html;base64,AAAA",
        "javascript:1",
    ),
    *(
        "https://" + "a" * 9000 + ".example/",
        "https://１２７.0.0.1/",
        "https://127。0。0。1/",
        "https://localhost/",
    ),
]


@pytest.mark.parametrize("url", HOSTILE)
def test_hostile_urls_dial_nothing(tmp_path: Path, url: str) -> None:
    """R9: a table of more than 40 URLs; nothing is dialled for any of them."""
    site = Site()
    fetcher = Fetcher(FetchPolicy(), LIMITS, tmp_path, resolver=system, transport=site.transport())
    with pytest.raises((BadRequest, Forbidden, MediaError)) as caught:
        get(fetcher, url)
    assert site.requests == []
    assert leftovers(tmp_path) == []
    assert "127.0.0.1" not in caught.value.public_message


def test_the_table_is_long_enough() -> None:
    """R9."""
    assert len(set(HOSTILE)) >= 40


def _awaited(intake: Intake, part: MediaPart) -> MediaRef:
    return asyncio.run(intake.bring(part))


@pytest.mark.parametrize("way", ["server", "frames", "batch"])
@pytest.mark.parametrize("url", HOSTILE)
def test_no_way_in_dials_them(tmp_path: Path, url: str, way: str) -> None:
    """R9: the server's media, the frames of a list, and what `LLM` and batches resolve, by one policy."""
    if way == "batch" and (not re.match("https?:", url, re.IGNORECASE)):
        pytest.skip("a path or file of the user who runs the batch")
    site = Site()
    fetcher = Fetcher(FetchPolicy(), LIMITS, tmp_path, resolver=system, transport=site.transport())
    intake = Intake(fetcher, 1 << 20)
    if way == "batch":
        bring = partial(intake.resolve, MediaPart("image", url))
    else:
        part = MediaPart("image", url) if way == "server" else MediaPart("video", (url,))
        bring = partial(_awaited, intake, part)
    with pytest.raises((BadRequest, Forbidden, MediaError)):
        bring()
    assert site.requests == []
    assert leftovers(tmp_path) == []


def test_one_private_answer_among_public_ones_is_enough(tmp_path: Path) -> None:
    """R9."""
    site = Site()
    mixed = resolver(["1.1.1.1", "10.0.0.1"])
    fetcher = Fetcher(FetchPolicy(), LIMITS, tmp_path, resolver=mixed, transport=site.transport())
    with pytest.raises(Forbidden, match="public internet"):
        get(fetcher, "https://rebind.example/")
    assert site.requests == []


def test_rebinding_between_hops_is_caught_and_one_hop_resolves_once(tmp_path: Path) -> None:
    """R9: the first answer is public, the second is not."""
    asked: list[str] = []
    site = Site({"/go": (302, {"location": "/again"}, b"")})

    async def rebind(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["1.1.1.1"] if len(asked) == 1 else ["127.0.0.1"]

    fetcher = Fetcher(FetchPolicy(), LIMITS, tmp_path, resolver=rebind, transport=site.transport())
    with pytest.raises(Forbidden):
        get(fetcher, "https://rebind.example/go")
    assert asked == ["rebind.example"] * 2
    assert [request.url.host for request in site.requests] == ["1.1.1.1"]


@pytest.mark.parametrize(
    "location",
    [
        *(
            "https://127.0.0.1/",
            "https://[::ffff:10.0.0.1]/",
            "http://1.1.1.1/",
            "file:///etc/passwd",
            "//127.0.0.1/x",
        ),
        *(
            "https://1.1.1.1:22/",
            "https://u:p@1.1.1.1/",
            "data:image/png;base64,AAAA",
            "https://a\\@127.0.0.1/",
            "",
        ),
    ],
)
def test_redirects_are_judged_like_first_urls(tmp_path: Path, location: str) -> None:
    site = Site({"/go": (302, {"location": location}, b"")})
    fetcher = Fetcher(
        FetchPolicy(allow_http=True), LIMITS, tmp_path, resolver=system, transport=site.transport()
    )
    with pytest.raises((BadRequest, Forbidden, MediaError)):
        get(fetcher, "https://1.1.1.1/go")
    assert len(site.requests) == 1


def test_three_redirects_pass_and_four_do_not(tmp_path: Path) -> None:
    """R9."""
    hops = {f"/{n}": (301, {"location": f"/{n - 1}"}, b"") for n in range(1, 5)}
    site = Site(hops)
    fetcher = Fetcher(
        FetchPolicy(), LIMITS, tmp_path, resolver=resolver(["1.1.1.1"]), transport=site.transport()
    )
    assert get(fetcher, "https://a.example/3").digest == DIGEST
    with pytest.raises(MediaError, match="at most 3 redirects"):
        get(fetcher, "https://a.example/4")


def test_only_allowed_hosts_where_a_list_is_given(tmp_path: Path) -> None:
    site = Site({"/go": (302, {"location": "https://b.example/"}, b"")})
    policy = FetchPolicy(allowed_hosts=("a.example",))
    fetcher = Fetcher(policy, LIMITS, tmp_path, resolver=resolver(["1.1.1.1"]), transport=site.transport())
    assert get(fetcher, "https://A.example/").digest == DIGEST
    for url in ("https://a.example.evil.example/", "https://b.example/", "https://a.example/go"):
        with pytest.raises(Forbidden, match="allowed hosts"):
            get(fetcher, url)


def test_a_redirect_never_reaches_a_canary_on_loopback(tmp_path: Path) -> None:
    """R9: 0 hits."""
    hits: list[bytes] = []

    async def canary(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hits.append(await reader.read(1))
        writer.close()

    async def chain() -> None:
        async with serving(canary) as port:
            for target in (f"https://127.0.0.1:{port}/", f"https://localhost:{port}/", "https://127.0.0.1/"):
                site = Site({"/go": (307, {"location": target}, b"")})
                fetcher = Fetcher(
                    FetchPolicy(), LIMITS, tmp_path, resolver=system, transport=site.transport()
                )
                with pytest.raises((Forbidden, MediaError)):
                    await fetcher.fetch("https://1.1.1.1/go", "image")

    asyncio.run(chain())
    assert hits == []
