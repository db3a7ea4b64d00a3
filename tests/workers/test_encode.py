"""The encode handler with a fake sandbox and a fake tower: what is decoded, encoded, cached, answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve import messages as m
from mmserve.budget import Budget
from mmserve.encoders.base import Encoded, EncodedImage, Features
from mmserve.encoders.cache import EmbeddingCache
from mmserve.errors import MediaError
from mmserve.media.plan import MediaPlan
from mmserve.media.pool import SandboxPool
from mmserve.media.preprocess import PixelFormat, Preprocessing
from mmserve.media.sandbox import Decoded
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.request import MediaOptions, MediaRef, Methods, Modality, Option
from mmserve.tensors import tensors_of
from mmserve.transfer import LeaseStore, MappedLeases, open_lease
from mmserve.workers import encode, items
from mmserve.workers.encode import CROPS_PER_BATCH, MAX_QUEUED, EncodeHandler
from mmserve.workers.items import Tools
from tests.workers.fakes import FakeReporter

MODALITIES: tuple[Modality, ...] = ("image", "video")
SIDE, WIDTH = 8, 4
GEOMETRY = Geometry(image_side=SIDE, patch_side=2, pinpoints=((SIDE, SIDE),), max_crops=9)
FRAME_TOKENS = GEOMETRY.frame_tokens
PIXELS = PixelFormat(side=SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass
class FakeSandbox:
    """Frame i of a file has the colour i; positions in `broken` do not decode."""

    frames: int = 20
    broken: set[int] = field(default_factory=set)
    plans: list[MediaRef] = field(default_factory=list)
    decoded: list[tuple[int, ...]] = field(default_factory=list)
    slow: set[str] = field(
        default_factory=set
    )  # digests of files that are not ready until one waits for them
    unready: set[str] = field(default_factory=set)  # digests of files that cannot even be asked about
    asked: list[str] = field(default_factory=list)  # files of the segments that were waited for
    asked_whole: set[bool] = field(default_factory=set)
    closed: int = 0
    error: Exception | None = None

    def plan(self, ref: MediaRef) -> MediaPlan:
        self.plans.append(ref)
        if self.error is not None:
            raise self.error
        count = 1 if ref.modality == "image" else min(self.frames, ref.options.num_frames or 32)
        return MediaPlan(
            kind=ref.modality,
            width=SIDE,
            height=SIDE,
            duration_s=10.0,
            fps=2.0,
            times_s=tuple(i / 2 for i in range(count)),
            frame_indices=tuple(range(count)),
            total_frames=count,
            decoder="fake",
        )

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        return {"frames_decoded": sum(map(len, self.decoded))}, {}

    def segments(self, ref: MediaRef, plan: MediaPlan, positions: Sequence[int]) -> FakeSegments:
        return FakeSegments(self, ref, plan, [positions[i : i + 8] for i in range(0, len(positions), 8)])

    def decode(self, ref: MediaRef, plan: MediaPlan, positions: Sequence[int]) -> Decoded:
        self.decoded.append(tuple(positions))
        good = tuple(i for i in positions if i not in self.broken)
        frames = np.zeros((len(good), SIDE, SIDE, 3), np.uint8) + np.array(good, np.uint8).reshape(
            -1, 1, 1, 1
        )
        lost = tuple(i for i in positions if i in self.broken)
        return Decoded(frames, good, lost, 1.0)


@dataclass
class FakeSegments:
    sandbox: FakeSandbox
    ref: MediaRef
    plan: MediaPlan
    left: list[Sequence[int]]

    def __next__(self) -> Decoded:
        self.sandbox.asked.append(self.ref.digest)
        return self.sandbox.decode(self.ref, self.plan, self.left.pop(0))

    def is_ready(self, *, whole: bool) -> bool:
        if self.ref.digest in self.sandbox.unready:
            raise MediaError("The decoder is gone")
        self.sandbox.asked_whole.add(whole)
        return self.ref.digest not in self.sandbox.slow

    def wait(self) -> None:
        self.sandbox.slow.discard(self.ref.digest)

    def change(self, positions: Iterable[int]) -> None:
        wanted = sorted(positions)
        self.left = [wanted[i : i + 8] for i in range(0, len(wanted), 8)]

    def close(self) -> None:
        self.sandbox.closed += 1


class FakeVision:
    """The embedding of a frame is its colour."""

    newline = torch.full((WIDTH,), -1.0)

    def __init__(self) -> None:
        self.encoded: list[int] = []  # crops of every call
        self.error: Exception | None = None

    def features(self, pixels: Tensor) -> Features:
        self.encoded.append(len(pixels))
        if self.error is not None:
            raise self.error
        colour = (pixels[:, 0, 0, 0] * 255).round()
        return Features(colour[:, None, None].expand(-1, 1, WIDTH), torch.ones(len(pixels), 1))

    def frames(self, features: Features) -> Encoded:
        rows = features.rows.expand(-1, FRAME_TOKENS, -1)
        return Encoded(rows, torch.ones(len(rows), FRAME_TOKENS))

    def newline_rows(self, original_size: tuple[int, int], crops: int) -> Tensor:
        images = 1 if crops > 1 else 2
        rows = torch.zeros(GEOMETRY.image_tokens(*original_size, images), dtype=torch.bool)
        (height, width), *tiles = GEOMETRY.image_grids(*original_size, images)
        # after each row of tiles, or at the end
        columns = tiles[0][1] if tiles else 0
        rows[height * width + columns :: columns + 1] = True
        return rows

    def pack(self, features: Features, original_size: tuple[int, int]) -> EncodedImage:
        newline = self.newline_rows(original_size, len(features.rows))
        return EncodedImage(torch.ones(len(newline), WIDTH), torch.ones(len(newline)), newline)


@dataclass
class Published:
    """An item that was published whole."""

    request_id: str
    parts: list[m.EncodedPart]
    whole: m.EncodedMedia

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def kept(self) -> int:
        return sum(part.kept for part in self.parts)


class Encoder:
    def __init__(
        self, directory: Path, *, cache_bytes: int = 1 << 20, overlap: bool = True, **sandbox: object
    ) -> None:
        self.directory = directory
        self.sandbox = FakeSandbox(**sandbox)  # type: ignore[arg-type]  # named as its fields
        self.vision = FakeVision()
        self.reporter = FakeReporter()
        self.leases = LeaseStore([directory])
        tools = Tools(
            vision=self.vision,
            geometry=GEOMETRY,
            preprocessing=Preprocessing(image=PIXELS, video=PIXELS, pinpoints=GEOMETRY.pinpoints),
            weights_revision="w",
            sandbox=cast("SandboxPool", self.sandbox),
            cache=EmbeddingCache(cache_bytes),
            leases=self.leases,
            reporter=self.reporter,
            overlap=overlap,
        )
        self.handler = EncodeHandler(tools, MappedLeases([directory]))
        self.reporter.handler = self.handler

    def ask(
        self,
        name: str = "r",
        *,
        digest: str = "d",
        modality: Modality = "video",
        frames: int | None = None,
        prune: str = "none",
        keep: Budget = 1.0,
        keep_image: Budget | None = None,
        prune_options: dict[str, Option] | None = None,
        prune_text_images: bool = False,
        salt: str = "",
        only_image: bool = True,
    ) -> None:
        media = MediaRef(
            modality=modality,
            path=f"/media/{digest}",
            digest=digest,
            source="clip",
            options=MediaOptions(num_frames=frames),
        )
        self.handler.handle(
            m.EncodeMedia(
                request_id=name,
                attempt=3,
                item=0,
                media=media,
                methods=Methods(
                    prune=prune,
                    keep=keep,
                    keep_image=keep_image,
                    prune_options=prune_options or {},
                    prune_text_images=prune_text_images,
                ),
                salt=salt,
                is_only_image=only_image,
            )
        )

    def run(self) -> list[Published]:
        """Do everything; the items that were finished, in that order."""
        before = len(self.reporter.events)
        while self.handler.step():
            pass
        parts: dict[str, list[m.EncodedPart]] = {}
        done = []
        for event in self.reporter.events[before:]:
            if isinstance(event, m.MediaEncoded):
                parts.setdefault(event.request_id, []).append(event.part)
                if event.whole is not None:
                    done.append(Published(event.request_id, parts[event.request_id], event.whole))
        return done

    def arrays(self, item: Published) -> dict[str, Tensor]:
        """The item's arrays, as if it were published in one part."""
        parts = [tensors_of(part.lease, open_lease(part.lease, [self.directory])) for part in item.parts]
        first = 0
        for part, arrays in zip(item.parts, parts, strict=True):
            arrays["source"] = arrays["source"] + first
            first += part.tokens
        return {name: torch.cat([arrays[name] for arrays in parts]) for name in parts[0]}


def test_a_video_is_decoded_in_segments_and_published_in_order(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask()
    (event,) = encoder.run()
    assert encoder.sandbox.decoded == [tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))]
    assert [part.tokens for part in event.parts] == [8 * FRAME_TOKENS, 8 * FRAME_TOKENS, 4 * FRAME_TOKENS + 1]
    arrays = encoder.arrays(event)
    tokens = 20 * FRAME_TOKENS + 1
    assert (event.tokens, event.kept, event.whole.cached_tokens) == (tokens, tokens, 0)
    assert arrays["source"].tolist() == list(range(tokens))
    colours = [i for i in range(20) for _ in range(FRAME_TOKENS)]
    assert arrays["embeddings"][:-1, 0].tolist() == colours
    assert arrays["embeddings"][-1].tolist() == [-1.0] * WIDTH
    assert event.whole.report.timestamps_s == tuple(i / 2 for i in range(20))
    planned = encoder.reporter.of(m.MediaPlanned)[0]
    assert encoder.reporter.events[0] is planned, "the plan comes first"
    assert (planned.attempt, planned.keep_bound) == (3, tokens)


def test_without_overlap_an_item_is_decoded_whole_and_published_whole(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, overlap=False)
    encoder.ask()
    (event,) = encoder.run()
    assert encoder.sandbox.asked_whole == {True}
    assert encoder.vision.encoded == [8, 8, 4], "the tower's batches are the same"
    (part,) = event.parts
    assert part.tokens == event.tokens == 20 * FRAME_TOKENS + 1
    usual = Encoder(tmp_path)
    usual.ask()
    assert torch.equal(usual.arrays(usual.run()[0])["embeddings"], encoder.arrays(event)["embeddings"])
    assert usual.sandbox.asked_whole == {False}


def test_a_second_request_for_the_same_frames_decodes_and_encodes_nothing(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a")
    encoder.ask("b", prune="uniform", keep=0.5)
    first, second = encoder.run()
    assert len(encoder.sandbox.plans) == 1
    assert sum(encoder.vision.encoded) == 20, "identical items in flight are encoded once"
    assert second.whole.cached_tokens == 20 * FRAME_TOKENS
    assert second.whole.times.encode == second.whole.times.preprocess == 0.0
    assert second.kept < first.kept
    assert len(encoder.arrays(second)["source"]) == second.kept
    assert encoder.reporter.of(m.MediaPlanned)[1].keep_bound >= second.kept


def test_overlapping_samplings_share_their_frames(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a", frames=6)
    encoder.ask("b", frames=10)
    _, second = encoder.run()
    assert encoder.sandbox.decoded[1:] == [(6, 7, 8, 9)]
    assert second.whole.cached_tokens == 6 * FRAME_TOKENS
    assert encoder.arrays(second)["embeddings"][:-1:FRAME_TOKENS, 0].tolist() == list(range(10))


@pytest.mark.parametrize("other", [{"salt": "t"}, {"digest": "e"}])
def test_other_tenants_and_other_bytes_share_nothing(tmp_path: Path, other: dict[str, str]) -> None:
    """R18: the same bytes of another tenant are a miss."""
    encoder = Encoder(tmp_path)
    encoder.ask("a")
    encoder.ask("b", **other)  # type: ignore[arg-type]  # strings only
    assert [event.whole.cached_tokens for event in encoder.run()] == [0, 0]
    assert sum(encoder.vision.encoded) == 40


def test_a_video_is_the_same_beside_any_number_of_images(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a", only_image=False)
    encoder.ask("b", only_image=True)
    assert encoder.run()[1].whole.cached_tokens == 20 * FRAME_TOKENS


def test_an_image_alone_is_cut_into_tiles_and_cached_apart(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    for name, only in (("a", True), ("b", False), ("c", True), ("d", False)):
        encoder.ask(name, modality="image", only_image=only)
    done = {item.request_id: item for item in encoder.run()}
    alone, one_of_many, again, many_again = (done[name] for name in "abcd")
    assert encoder.vision.encoded == [3], "both pictures in one look of the tower"
    assert alone.tokens == GEOMETRY.image_tokens(SIDE, SIDE)
    assert one_of_many.tokens == GEOMETRY.image_tokens(SIDE, SIDE, 2)
    assert again.whole.cached_tokens == again.tokens == alone.tokens
    assert many_again.whole.cached_tokens == one_of_many.tokens
    planned = encoder.reporter.of(m.MediaPlanned)
    assert [event.keep_bound for event in planned[:2]] == [alone.tokens, one_of_many.tokens]


@pytest.mark.parametrize("prune", ["random", "uniform", "holitom", "prumerge", "sttm"])
def test_a_reduced_image_keeps_no_more_than_its_bound(tmp_path: Path, prune: str) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask(modality="image", prune=prune, keep=0.25)
    (event,) = encoder.run()
    assert event.kept < event.tokens
    assert event.kept <= encoder.reporter.of(m.MediaPlanned)[0].keep_bound
    # the newline is never reduced
    assert int(encoder.arrays(event)["source"][-1]) == event.tokens - 1


def test_carriers_come_with_the_frames_they_stand_for(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, broken={2})
    encoder.ask(prune="carriers", frames=20)
    (video,) = encoder.run()
    planned = encoder.reporter.of(m.MediaPlanned)[0]
    assert planned.keep_bound == 20 * FRAME_TOKENS + 1
    assert (planned.lasting_bound, planned.frame_rows) == (21, FRAME_TOKENS)
    assert video.kept == 19 * FRAME_TOKENS + 1
    # numbered in every part anew; the newline is of no frame
    numbers = [*range(7), *range(8), *range(4)]
    expected = [number for number in numbers for _ in range(FRAME_TOKENS)]
    assert encoder.arrays(video)["frame"].tolist() == [*expected, -1]
    encoder.ask("image", modality="image", prune="carriers")
    (image,) = encoder.run()
    assert encoder.arrays(image)["frame"].tolist() == [-1] * image.tokens
    assert encoder.reporter.of(m.MediaPlanned)[-1].lasting_bound is None


def test_lost_frames_are_left_out_reported_and_not_tried_again(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, broken={2, 9})
    encoder.ask("a")
    (event,) = encoder.run()
    assert event.whole.report.lost_frames == 2
    assert event.whole.report.frames == len(event.whole.report.timestamps_s) == 18
    assert 1.0 not in event.whole.report.timestamps_s
    assert event.tokens == 18 * FRAME_TOKENS + 1
    assert 2.0 not in encoder.arrays(event)["embeddings"][:, 0]
    decodes = len(encoder.sandbox.decoded)
    encoder.ask("b")
    (again,) = encoder.run()
    assert len(encoder.sandbox.decoded) == decodes
    assert again.whole.report == event.whole.report
    assert again.tokens == event.tokens


def test_a_lost_frame_that_another_range_decoded_is_used_and_reported(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, broken={2})
    encoder.ask("a", frames=6)
    (lossy,) = encoder.run()
    assert lossy.whole.report.lost_frames == 1
    encoder.sandbox.broken.clear()
    encoder.ask("b", frames=10)
    encoder.ask("a again", frames=6)
    _, again = encoder.run()
    assert (again.whole.report.lost_frames, again.whole.report.frames) == (0, 6)
    assert again.tokens == 6 * FRAME_TOKENS + 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_video_of_lost_frames_only_is_a_media_error(tmp_path: Path, times: int) -> None:
    encoder = Encoder(tmp_path, broken=set(range(20)))
    for number in range(times):
        encoder.ask(f"r{number}")
    assert encoder.run() == []
    failures = encoder.reporter.of(m.RequestFailed)
    assert [(event.code, event.attempt) for event in failures] == [("media_error", 3)] * times
    assert len(encoder.sandbox.decoded) == 3, "hopeless frames were tried twice"
    assert encoder.leases.num_held == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(MediaError("Expected a video, but got a song"), "media_error"), (ValueError(), "internal_error")],
)
def test_an_item_that_fails_is_answered_and_the_next_one_runs(
    tmp_path: Path, error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(tmp_path, error=error)
    encoder.ask("bad")
    encoder.run()
    encoder.sandbox.error = None
    encoder.ask("good")
    (event,) = encoder.run()
    assert event.request_id == "good"
    (failure,) = encoder.reporter.of(m.RequestFailed)
    assert (failure.request_id, failure.code) == ("bad", code)
    assert bool(caplog.records) == (code == "internal_error")


def test_budgets_are_kept_to_the_token(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    for prune in ("uniform", "random", "holitom"):
        for keep, kept in (
            (11, 11),
            ("2/frame", 40),
            (5000, 20 * FRAME_TOKENS),
            ("99/frame", 20 * FRAME_TOKENS),
        ):
            encoder.ask(prune=prune, keep=keep)
            (video,) = encoder.run()
            assert video.kept == kept + 1
            assert encoder.reporter.of(m.MediaPlanned)[-1].keep_bound == kept + 1
    newlines = 1
    for given, kept in (({"keep": 7}, 7), ({"keep": 0.25, "keep_image": "3/frame"}, 3)):
        encoder.ask("i", modality="image", only_image=False, prune="random", **given)
        (image,) = encoder.run()
        assert image.kept == kept + newlines


def test_rows_are_known_by_what_a_budget_comes_to(tmp_path: Path) -> None:
    """Equal numbers and spelled-out defaults share their KV; other settings never do."""

    def keys(**given: object) -> list[object]:
        encoder.ask(prune="holitom", **given)  # type: ignore[arg-type]  # named as its parameters
        return list(encoder.arrays(encoder.run()[0])["key"][0])

    encoder = Encoder(tmp_path)
    quarter = keys(keep=0.25)
    assert quarter == keys(keep=20 * FRAME_TOKENS // 4) == keys(keep=f"{FRAME_TOKENS // 4}/frame")
    assert quarter == keys(keep=0.25, prune_options={"beta": 0.6, "tau": None})
    assert quarter != keys(keep=0.25, prune_options={"beta": 0.5})
    assert quarter != keys(keep=0.5)


def test_an_image_of_text_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[object] = []

    def judge(picture: object) -> bool:
        judged.append(picture)
        return True

    monkeypatch.setattr(items, "is_textual", judge)
    encoder = Encoder(tmp_path)

    def ask(**given: object) -> tuple[int, bool]:
        encoder.ask(modality="image", **given)  # type: ignore[arg-type]  # named as its parameters
        (image,) = encoder.run()
        assert image.kept <= encoder.reporter.of(m.MediaPlanned)[-1].keep_bound
        return image.tokens - image.kept, image.whole.report.guarded

    for dense in ({}, {"prune": "fastv"}, {"prune": "carriers"}, {"prune": "uniform"}):
        assert ask(**dense) == (0, False)
    assert not judged
    # what the cache holds has to be decoded once more, and is judged once
    assert ask(prune="uniform", keep=0.25) == ask(prune="random", keep=0.5) == (0, True)
    assert len(judged) == 1
    assert encoder.reporter.of(m.MediaEncoded)[-1].part.guarded
    assert ask(prune="fastv", keep=0.5) == ask(prune="uniform+fastv", keep=0.25) == (0, True)
    dropped, guarded = ask(prune="uniform", keep=0.25, prune_text_images=True)
    assert dropped > 0
    assert not guarded
    encoder.ask(prune="uniform", keep=0.25)
    (video,) = encoder.run()
    assert video.kept < video.tokens
    assert not video.whole.report.guarded


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tua": 1}, "settings of holitom to be one of window_frames, tau"),
        ({"tau": 2}, "tau above 0"),
        ({"beta": "x"}, "beta"),
    ],
)
def test_settings_that_a_method_does_not_take_are_refused(
    tmp_path: Path, options: dict[str, Option], why: str
) -> None:
    encoder = Encoder(tmp_path)
    for modality in MODALITIES:
        encoder.ask(modality, modality=modality, prune="holitom", keep=0.5, prune_options=options)
    assert encoder.run() == []
    for failure in encoder.reporter.of(m.RequestFailed):
        assert failure.code == "bad_request"
        assert why in failure.public_message
    assert not encoder.sandbox.decoded


def test_an_unknown_method_is_answered(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask(prune="nothing_like_it")
    assert encoder.run() == []
    assert encoder.reporter.of(m.RequestFailed)[0].code == "bad_request"


def test_cancelled_items_are_never_opened(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    for name in ("a", "b", "a"):
        encoder.ask(name, digest=name)
    encoder.handler.handle(m.CancelRequest(request_id="a"))
    assert [event.request_id for event in encoder.run()] == ["b"]
    assert encoder.handler.credits() == encoder.handler.capacity


def test_credits_shrink_with_the_queue_and_leases_go_when_released(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    assert encoder.handler.credits().requests == MAX_QUEUED
    encoder.ask("a")
    encoder.ask("b")
    assert encoder.handler.credits().requests == MAX_QUEUED - 2
    events = encoder.run()
    assert encoder.handler.credits().requests == MAX_QUEUED
    assert encoder.leases.num_held == 4
    for part in [part for event in (*events, *events) for part in event.parts]:
        encoder.handler.handle(m.ReleaseLease(lease_id=part.lease.lease_id))
    assert encoder.leases.num_held == 0


def test_without_a_cache_everything_still_works(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, cache_bytes=0)
    encoder.ask("a")
    encoder.ask("b")
    first, second = encoder.run()
    assert second.whole.cached_tokens == 0
    assert torch.equal(encoder.arrays(first)["embeddings"], encoder.arrays(second)["embeddings"])


def test_a_whole_item_method_publishes_window_by_window(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, frames=100)
    encoder.ask(frames=100, prune="holitom", keep=0.5)
    (item,) = encoder.run()
    assert [part.tokens for part in item.parts] == [64 * FRAME_TOKENS, 36 * FRAME_TOKENS + 1]
    encoder.ask("again", frames=100, prune="uniform", keep=0.5)
    (item,) = encoder.run()
    assert len(item.parts) == 1, "what looks at the whole item waits for all of it"


def test_rows_are_told_apart_by_frame_and_method_however_the_item_was_cut(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("half", frames=10)
    encoder.ask("all", frames=20)
    encoder.ask("reduced", frames=10, prune="uniform", keep=0.5)
    half, everything, reduced = encoder.run()
    assert [part.tokens // FRAME_TOKENS for part in everything.parts] == [10, 8, 2]
    rows = [_named(encoder.arrays(item)) for item in (half, everything, reduced)]
    assert rows[0][:-1] == rows[1][: len(rows[0]) - 1]
    assert rows[0][-1] == rows[1][-1], "every newline is the same"
    assert len(set(rows[1])) == len(rows[1])
    assert not set(rows[2][:-1]) & set(rows[1])
    # what acts inside the language model changes nothing here
    encoder.ask("inner", frames=10, prune="fastv", keep=0.5)
    encoder.ask("both", frames=10, prune="uniform+fastv", keep=0.5)
    assert [_named(encoder.arrays(item)) for item in encoder.run()] == [rows[0], rows[2]]


def _named(arrays: dict[str, Tensor]) -> list[tuple[bytes, int]]:
    keys = [bytes(key) for key in arrays["key"].tolist()]
    return list(zip(keys, arrays["index"].tolist(), strict=True))


def test_what_waits_for_a_decoder_holds_up_nothing_else(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, slow={"slow"})
    encoder.ask("slow", digest="slow")
    encoder.ask("quick", digest="quick")
    assert [item.request_id for item in encoder.run()] == ["quick", "slow"]
    assert encoder.sandbox.asked[0] == "quick", "not even the first segment is waited for"


def test_an_item_that_cannot_be_asked_about_fails_once_and_alone(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, unready={"bad"})
    encoder.ask("bad", digest="bad")
    encoder.ask("good", digest="good")
    assert [item.request_id for item in encoder.run()] == ["good"]
    assert [event.request_id for event in encoder.reporter.of(m.RequestFailed)] == ["bad"]
    encoder.ask("alone", digest="bad")
    assert encoder.run() == []
    assert len(encoder.reporter.of(m.RequestFailed)) == 2


def test_a_large_photo_does_not_wait_for_a_long_video_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "SHORT_CROPS", 1)
    encoder = Encoder(tmp_path, frames=200)
    encoder.ask("long", frames=200)
    encoder.handler.step()
    encoder.ask("photo", digest="photo", modality="image")
    for _ in range(3):
        encoder.handler.step()
    done = [event.request_id for event in encoder.reporter.of(m.MediaEncoded) if event.whole is not None]
    assert done == ["photo"]


def test_an_image_does_not_wait_for_a_long_video(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, frames=200)
    encoder.ask("long", frames=200)
    encoder.handler.step()
    for name in "ab":
        encoder.ask(name, digest=name, modality="image")
    encoder.handler.step()
    encoder.handler.step()
    done = {event.request_id for event in encoder.reporter.of(m.MediaEncoded) if event.whole is not None}
    assert done == {"a", "b"}
    assert [item.request_id for item in encoder.run()] == ["long"]


def test_a_look_of_the_tower_has_a_budget(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    for number in range(12):
        encoder.ask(f"r{number}", digest=f"d{number}", modality="image")
    assert len(encoder.run()) == 12
    assert max(encoder.vision.encoded) <= CROPS_PER_BATCH["cpu"]
    assert sum(encoder.vision.encoded) == 24
    assert len(encoder.vision.encoded) == 3


def test_a_cancelled_video_stops_decoding_and_who_waited_for_it_goes_on(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a")
    encoder.ask("b")
    encoder.handler.step()
    encoder.handler.handle(m.CancelRequest(request_id="a"))
    assert encoder.sandbox.closed == 1
    (item,) = encoder.run()
    assert item.request_id == "b"
    assert item.whole.cached_tokens == 8 * FRAME_TOKENS
    assert sum(encoder.vision.encoded) == 20


def test_a_tower_that_fails_fails_what_it_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(tmp_path)
    encoder.vision.error = RuntimeError("no more memory")
    encoder.ask("a", modality="image")
    assert encoder.run() == []
    encoder.vision.error = None
    encoder.ask("b", modality="image")
    assert [item.request_id for item in encoder.run()] == ["b"]
    assert [event.request_id for event in encoder.reporter.of(m.RequestFailed)] == ["a"]
    assert len(caplog.records) == 1


# one video on two workers


@dataclass
class Pair:
    """An owner and a helper, and the dispatcher's part between them."""

    owner: Encoder
    helper: Encoder

    def share(self, positions: tuple[int, ...], frames: int = 40) -> None:
        media = MediaRef(
            modality="video", path="/m", digest="d", source="clip", options=MediaOptions(num_frames=frames)
        )
        ask = m.EncodeFrames(request_id="r", attempt=3, item=0, media=media, positions=positions)
        self.helper.handler.handle(ask)
        self.leave(positions)

    def leave(self, positions: tuple[int, ...]) -> None:
        self.owner.handler.handle(m.AwaitFrames(request_id="r", attempt=3, item=0, positions=positions))

    def forward(self) -> None:
        """Everything that the helper has."""
        while self.helper.handler.step():
            pass
        for event in self.helper.reporter.of(m.FramesEncoded):
            take = m.TakeFrames(request_id="r", attempt=3, item=0, frames=event.frames)
            self.owner.handler.handle(take)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(Encoder(tmp_path, frames=40), Encoder(tmp_path, frames=40))


@pytest.mark.parametrize("steps", range(1, 4))
def test_two_workers_publish_what_one_would(tmp_path: Path, pair: Pair, steps: int) -> None:
    alone = Encoder(tmp_path, frames=40)
    alone.ask(frames=40)
    (expected,) = alone.run()
    pair.owner.ask(frames=40)
    for _ in range(steps):
        pair.owner.handler.step()
    pair.share(tuple(range(24, 40)))
    pair.owner.run()
    assert not pair.owner.handler.step(), "it waits for the helper without turning"
    pair.forward()
    pair.owner.run()
    events = pair.owner.reporter.of(m.MediaEncoded)
    assert events[-1].whole is not None
    parts = [event.part for event in events]
    found = pair.owner.arrays(Published("r", parts, events[-1].whole))
    for name, array in alone.arrays(expected).items():
        assert torch.equal(found[name], array)
    assert events[-1].whole.report == expected.whole.report
    assert sum(pair.owner.vision.encoded) == 24
    assert sum(pair.helper.vision.encoded) == 16
    assert pair.owner.handler.credits() == pair.owner.handler.capacity
    pair.owner.ask("again", frames=40)
    assert pair.owner.run()[0].whole.cached_tokens == 40 * FRAME_TOKENS


def test_frames_that_a_helper_lost_are_lost(pair: Pair) -> None:
    pair.helper.sandbox.broken = {25, *range(32, 40)}
    pair.owner.ask(frames=40)
    pair.owner.handler.step()
    pair.share(tuple(range(24, 40)))
    pair.owner.run()
    pair.forward()
    pair.owner.run()
    whole = pair.owner.reporter.of(m.MediaEncoded)[-1].whole
    assert whole is not None
    assert whole.report.lost_frames == 9


def test_an_owner_whose_own_last_segment_is_lost_waits_for_its_helper(pair: Pair) -> None:
    pair.owner.sandbox.broken = set(range(16, 24))
    pair.owner.ask(frames=40)
    pair.owner.handler.step()
    pair.share(tuple(range(24, 40)))
    pair.owner.run()
    pair.forward()
    pair.owner.run()
    whole = pair.owner.reporter.of(m.MediaEncoded)[-1].whole
    assert whole is not None
    assert (whole.report.lost_frames, whole.report.frames) == (8, 32)
    assert pair.owner.handler.credits() == pair.owner.handler.capacity


def test_an_owner_takes_back_what_a_lost_helper_had(pair: Pair) -> None:
    pair.owner.ask(frames=40)
    pair.owner.handler.step()
    pair.share(tuple(range(24, 40)))
    pair.owner.run()
    pair.leave(())
    pair.owner.run()
    whole = pair.owner.reporter.of(m.MediaEncoded)[-1].whole
    assert whole is not None
    assert whole.report.frames == 40
    pair.forward()  # it was only slow
    assert pair.owner.run() == []
    assert not pair.owner.reporter.of(m.RequestFailed)


def test_frames_that_cannot_be_read_are_encoded_by_their_owner(pair: Pair) -> None:
    pair.owner.ask(frames=40)
    pair.owner.handler.step()
    pair.share(tuple(range(24, 40)))
    while pair.helper.handler.step():
        pass
    event = pair.helper.reporter.of(m.FramesEncoded)[0]
    assert event.frames.lease is not None
    pair.helper.leases.release(event.frames.lease.lease_id)
    pair.owner.handler.handle(m.TakeFrames(request_id="r", attempt=3, item=0, frames=event.frames))
    for other in pair.helper.reporter.of(m.FramesEncoded)[1:]:
        pair.owner.handler.handle(m.TakeFrames(request_id="r", attempt=3, item=0, frames=other.frames))
    pair.owner.run()
    assert not pair.owner.reporter.of(m.RequestFailed)
    whole = pair.owner.reporter.of(m.MediaEncoded)[-1].whole
    assert whole is not None
    assert (whole.report.frames, whole.report.lost_frames) == (40, 0)
    assert sum(pair.owner.vision.encoded) == 40 - sum(pair.helper.vision.encoded) + len(
        event.frames.positions
    )
