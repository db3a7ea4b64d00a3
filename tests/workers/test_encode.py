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
from mmserve.encoders.base import Encoded, EncodedImage
from mmserve.encoders.cache import EmbeddingCache
from mmserve.errors import MediaError
from mmserve.media.plan import MediaPlan
from mmserve.media.preprocess import PixelFormat, Preprocessing
from mmserve.media.sandbox import Decoded, Sandbox
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.request import MediaOptions, MediaRef, Methods, Modality
from mmserve.tensors import tensors_of
from mmserve.transfer import LeaseStore, open_lease
from mmserve.workers.encode import MAX_QUEUED, EncodeHandler
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

    def decode(self, ref: MediaRef, plan: MediaPlan, positions: Sequence[int]) -> Decoded:
        self.decoded.append(tuple(positions))
        good = tuple(i for i in positions if i not in self.broken)
        frames = np.zeros((len(good), SIDE, SIDE, 3), np.uint8) + np.array(good, np.uint8).reshape(
            -1, 1, 1, 1
        )
        lost = tuple(i for i in positions if i in self.broken)
        return Decoded(frames, good, lost, 1.0)


class FakeVision:
    """The embedding of a frame is its colour."""

    newline = torch.full((WIDTH,), -1.0)

    def __init__(self) -> None:
        self.encoded: list[int] = []  # frames of every call

    def video(self, pixels: Tensor) -> Encoded:
        self.encoded.append(len(pixels))
        colour = (pixels[:, 0, 0, 0] * 255).round()
        rows = colour[:, None, None].expand(-1, FRAME_TOKENS, WIDTH)
        return Encoded(rows, torch.ones(len(pixels), FRAME_TOKENS))

    def newline_rows(self, original_size: tuple[int, int], crops: int) -> Tensor:
        rows = torch.zeros(GEOMETRY.image_tokens(*original_size, 1 if crops > 1 else 2), dtype=torch.bool)
        rows[-1] = True
        return rows

    def image(self, pixels: Tensor, original_size: tuple[int, int]) -> EncodedImage:
        self.encoded.append(len(pixels))
        newline = self.newline_rows(original_size, len(pixels))
        return EncodedImage(torch.ones(len(newline), WIDTH), torch.ones(len(newline)), newline)


class Encoder:
    def __init__(self, directory: Path, *, cache_bytes: int = 1 << 20, **sandbox: object) -> None:
        self.directory = directory
        self.sandbox = FakeSandbox(**sandbox)  # type: ignore[arg-type]  # named as its fields
        self.vision = FakeVision()
        self.reporter = FakeReporter()
        self.leases = LeaseStore([directory])
        self.handler = EncodeHandler(
            vision=self.vision,
            geometry=GEOMETRY,
            preprocessing=Preprocessing(image=PIXELS, video=PIXELS, pinpoints=GEOMETRY.pinpoints),
            weights_revision="w",
            sandbox=cast("Sandbox", self.sandbox),
            cache=EmbeddingCache(cache_bytes),
            leases=self.leases,
            reporter=self.reporter,
        )
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

    def run(self) -> list[m.MediaEncoded]:
        before = len(self.reporter.events)
        while self.handler.step():
            pass
        return [event for event in self.reporter.events[before:] if isinstance(event, m.MediaEncoded)]

    def arrays(self, event: m.MediaEncoded) -> dict[str, Tensor]:
        lease = event.encoded.lease
        return tensors_of(lease, open_lease(lease, [self.directory]))


def test_a_video_is_decoded_in_segments_and_published_in_order(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask()
    (event,) = encoder.run()
    assert encoder.sandbox.decoded == [tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))]
    arrays = encoder.arrays(event)
    tokens = 20 * FRAME_TOKENS + 1
    assert (event.encoded.tokens, event.encoded.kept, event.cached_tokens) == (tokens, tokens, 0)
    assert arrays["source"].tolist() == list(range(tokens))
    colours = [i for i in range(20) for _ in range(FRAME_TOKENS)]
    assert arrays["embeddings"][:-1, 0].tolist() == colours
    assert arrays["embeddings"][-1].tolist() == [-1.0] * WIDTH
    assert event.report.timestamps_s == tuple(i / 2 for i in range(20))
    planned = encoder.reporter.of(m.MediaPlanned)[0]
    assert encoder.reporter.events[0] is planned, "the plan comes first"
    assert (planned.attempt, planned.tokens) == (3, tokens)
    assert planned.keep_bound >= event.encoded.kept


def test_a_second_request_for_the_same_frames_decodes_and_encodes_nothing(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a")
    encoder.ask("b", prune="uniform", keep=0.5)
    first, second = encoder.run()
    assert len(encoder.sandbox.plans) == 1
    assert sum(encoder.vision.encoded) == 20, "identical items in flight are encoded once"
    assert second.cached_tokens == 20 * FRAME_TOKENS
    assert second.times.encode == second.times.preprocess == 0.0
    assert second.encoded.kept < first.encoded.kept
    assert len(encoder.arrays(second)["source"]) == second.encoded.kept
    assert encoder.reporter.of(m.MediaPlanned)[1].keep_bound >= second.encoded.kept


def test_overlapping_samplings_share_their_frames(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a", frames=6)
    encoder.ask("b", frames=10)
    _, second = encoder.run()
    assert encoder.sandbox.decoded[1:] == [(6, 7, 8, 9)]
    assert second.cached_tokens == 6 * FRAME_TOKENS
    assert encoder.arrays(second)["embeddings"][:-1:FRAME_TOKENS, 0].tolist() == list(range(10))


@pytest.mark.parametrize("other", [{"salt": "t"}, {"digest": "e"}])
def test_other_tenants_and_other_bytes_share_nothing(tmp_path: Path, other: dict[str, str]) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a")
    encoder.ask("b", **other)  # type: ignore[arg-type]  # strings only
    assert [event.cached_tokens for event in encoder.run()] == [0, 0]
    assert sum(encoder.vision.encoded) == 40


def test_a_video_is_the_same_beside_any_number_of_images(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask("a", only_image=False)
    encoder.ask("b", only_image=True)
    assert encoder.run()[1].cached_tokens == 20 * FRAME_TOKENS


def test_an_image_alone_is_cut_into_tiles_and_cached_apart(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    for name, only in (("a", True), ("b", False), ("c", True), ("d", False)):
        encoder.ask(name, modality="image", only_image=only)
    alone, one_of_many, again, many_again = encoder.run()
    assert encoder.vision.encoded == [2, 1]
    assert alone.encoded.tokens == GEOMETRY.image_tokens(SIDE, SIDE)
    assert one_of_many.encoded.tokens == GEOMETRY.image_tokens(SIDE, SIDE, 2)
    assert again.cached_tokens == again.encoded.tokens == alone.encoded.tokens
    assert many_again.cached_tokens == one_of_many.encoded.tokens
    planned = encoder.reporter.of(m.MediaPlanned)
    assert [event.tokens for event in planned[:2]] == [alone.encoded.tokens, one_of_many.encoded.tokens]


@pytest.mark.parametrize("prune", ["random", "uniform", "holitom"])
def test_a_reduced_image_keeps_no_more_than_its_bound(tmp_path: Path, prune: str) -> None:
    encoder = Encoder(tmp_path)
    encoder.ask(modality="image", prune=prune, keep=0.25)
    (event,) = encoder.run()
    assert event.encoded.kept < event.encoded.tokens
    assert event.encoded.kept <= encoder.reporter.of(m.MediaPlanned)[0].keep_bound
    # the newline is never reduced
    assert int(encoder.arrays(event)["source"][-1]) == event.encoded.tokens - 1


def test_lost_frames_are_left_out_reported_and_not_tried_again(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, broken={2, 9})
    encoder.ask("a")
    (event,) = encoder.run()
    assert event.report.lost_frames == 2
    assert event.report.frames == len(event.report.timestamps_s) == 18
    assert 1.0 not in event.report.timestamps_s
    assert event.encoded.tokens == 18 * FRAME_TOKENS + 1
    assert 2.0 not in encoder.arrays(event)["embeddings"][:, 0]
    decodes = len(encoder.sandbox.decoded)
    encoder.ask("b")
    (again,) = encoder.run()
    assert len(encoder.sandbox.decoded) == decodes
    assert again.report == event.report
    assert again.encoded.tokens == event.encoded.tokens


def test_a_lost_frame_that_another_range_decoded_is_used_and_reported(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, broken={2})
    encoder.ask("a", frames=6)
    (lossy,) = encoder.run()
    assert lossy.report.lost_frames == 1
    encoder.sandbox.broken.clear()
    encoder.ask("b", frames=10)
    encoder.ask("a again", frames=6)
    _, again = encoder.run()
    assert (again.report.lost_frames, again.report.frames) == (0, 6)
    assert again.encoded.tokens == 6 * FRAME_TOKENS + 1


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
    assert encoder.leases.num_held == 2
    for event in (*events, *events):
        encoder.handler.handle(m.ReleaseLease(lease_id=event.encoded.lease.lease_id))
    assert encoder.leases.num_held == 0


def test_without_a_cache_everything_still_works(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, cache_bytes=0)
    encoder.ask("a")
    encoder.ask("b")
    first, second = encoder.run()
    assert second.cached_tokens == 0
    assert torch.equal(encoder.arrays(first)["embeddings"], encoder.arrays(second)["embeddings"])
