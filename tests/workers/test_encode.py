"""The encode handler with a fake sandbox and a fake tower: what is decoded, encoded, cached, answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve import messages as m
from mmserve.encoders.base import Encoded, EncodedImage, Features
from mmserve.encoders.cache import EmbeddingCache
from mmserve.errors import MediaError
from mmserve.media.plan import MediaPlan
from mmserve.media.pool import SandboxPool
from mmserve.media.preprocess import PixelFormat, Preprocessing
from mmserve.media.sandbox import Decoded
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.request import MediaOptions, MediaRef, Methods, Modality
from mmserve.tensors import tensors_of
from mmserve.transfer import LeaseStore, open_lease
from mmserve.workers import encode
from mmserve.workers.encode import CROPS_PER_BATCH, MAX_QUEUED, EncodeHandler
from mmserve.workers.items import Tools
from tests.workers.fakes import FakeReporter

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
    slow: set[str] = field(default_factory=set)  # digests of files that are never ready
    unready: set[str] = field(default_factory=set)  # digests of files that cannot even be asked about
    asked: list[str] = field(default_factory=list)  # files of the segments that were waited for
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

    def is_ready(self) -> bool:
        if self.ref.digest in self.sandbox.unready:
            raise MediaError("The decoder is gone")
        return self.ref.digest not in self.sandbox.slow

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
        rows = torch.zeros(GEOMETRY.image_tokens(*original_size, 1 if crops > 1 else 2), dtype=torch.bool)
        rows[-1] = True
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
    def __init__(self, directory: Path, *, cache_bytes: int = 1 << 20, **sandbox: object) -> None:
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
        )
        self.handler = EncodeHandler(tools, [directory])
        self.reporter.handler = self.handler

    def ask(
        self,
        name: str = "r",
        *,
        digest: str = "d",
        modality: Modality = "video",
        frames: int | None = None,
        prune: str = "none",
        keep: float = 1.0,
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
                methods=Methods(prune=prune, keep=keep),
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


@pytest.mark.parametrize("prune", ["random", "uniform", "holitom"])
def test_a_reduced_image_keeps_no_more_than_its_bound(tmp_path: Path, prune: str) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask(modality="image", prune=prune, keep=0.25)
    (event,) = encoder.run()
    assert event.kept < event.tokens
    assert event.kept <= encoder.reporter.of(m.MediaPlanned)[0].keep_bound
    # the newline is never reduced
    assert int(encoder.arrays(event)["source"][-1]) == event.tokens - 1


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


def test_frames_that_cannot_be_read_fail_their_item_alone(pair: Pair) -> None:
    pair.owner.ask(frames=40)
    pair.owner.handler.step()
    pair.share(tuple(range(24, 40)))
    while pair.helper.handler.step():
        pass
    event = pair.helper.reporter.of(m.FramesEncoded)[0]
    assert event.frames.lease is not None
    pair.helper.leases.release(event.frames.lease.lease_id)
    pair.owner.handler.handle(m.TakeFrames(request_id="r", attempt=3, item=0, frames=event.frames))
    pair.owner.run()
    assert [failure.request_id for failure in pair.owner.reporter.of(m.RequestFailed)] == ["r"]
    pair.owner.ask("next", digest="e")
    assert [item.request_id for item in pair.owner.run()] == ["next"]
