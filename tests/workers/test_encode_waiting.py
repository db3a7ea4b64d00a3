"""What an encode worker holds and counts while items wait: cached rows, plans, frames decoded already."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mmserve import messages as m
from mmserve.encoders.tiers.memory import EntryMemory
from mmserve.encoders.tiers.record import Entry
from mmserve.media.limits import MediaLimits
from mmserve.media.pool import SandboxPool
from mmserve.request import MediaOptions, MediaRef
from mmserve.workers import encode
from mmserve.workers.items import Clock, Known
from mmserve.workers.videos import Frames
from tests.media.clips import make_video
from tests.workers.test_encode import FRAME_TOKENS, SIDE, WIDTH, Encoder, Published
from tests.workers.world import EEPD, World

ROW_BYTES = FRAME_TOKENS * (WIDTH + 1) * 4


def entries_alive() -> int:
    """Rows of frames that anything still refers to."""
    gc.collect()
    return sum(type(found) is Entry for found in gc.get_objects())


def test_videos_that_wait_hold_nothing_of_the_cache(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, frames=32)
    names = [f"file{number}" for number in range(6)]
    for name in names:
        encoder.ask(name, digest=name, frames=16)
    encoder.run()
    before = entries_alive()
    for name in names:
        encoder.ask(f"{name} again", digest=name, frames=32)
    for _ in range(2):
        encoder.handler.step()
    assert len(encoder.handler._long) == 6
    # the cache forgets all of it; two items run, with what they found and have not published
    encoder.handler._tools.cache._memory = EntryMemory(ROW_BYTES)
    assert entries_alive() <= before - 16 * 4
    encoder.run()
    assert all(whole(encoder, f"{name} again").whole.report.frames == 32 for name in names)


def test_what_left_the_cache_meanwhile_is_encoded_again(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, frames=32)
    for name in "abc":
        encoder.ask(name, digest=name, frames=16)
    expected = {}
    for event in encoder.run():
        expected[event.request_id] = encoder.arrays(event)["embeddings"][: 16 * FRAME_TOKENS]
    for name in "abc":
        encoder.ask(f"{name} again", digest=name, frames=32)
    encoder.handler.step()
    encoder.handler._tools.cache._memory = EntryMemory(1 << 20)
    encoder.run()
    found = {name: whole(encoder, f"{name} again") for name in "abc"}
    for name, rows in expected.items():
        assert torch.equal(encoder.arrays(found[name])["embeddings"][: 16 * FRAME_TOKENS], rows)
    # the third one had to wait: nothing was left for it
    assert [found[name].whole.cached_tokens // FRAME_TOKENS for name in "abc"] == [16, 16, 0]


def whole(encoder: Encoder, name: str) -> Published:
    """All that was published of a request."""
    events = [event for event in encoder.reporter.of(m.MediaEncoded) if event.request_id == name]
    assert events[-1].whole is not None
    return Published(name, [event.part for event in events], events[-1].whole)


def test_remembered_plans_weigh_no_more_than_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "MAX_PLANNED", 3 * (encode.PLAN_COST + 20))
    encoder = Encoder(tmp_path)
    for number in range(5):
        encoder.ask(f"r{number}", digest=f"d{number}")
        encoder.run()
    assert len(encoder.handler._known) == 3
    encoder.ask("again", digest="d4")
    encoder.run()
    assert len(encoder.sandbox.plans) == 5
    encoder.ask("forgotten", digest="d0")
    encoder.run()
    assert len(encoder.sandbox.plans) == 6


def test_an_encode_worker_counts_what_it_does(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    for name in "abc":
        encoder.ask(name)
    encoder.ask("picture", digest="p", modality="image")
    encoder.run()
    last = encoder.reporter.of(m.WorkCounted)[-1]
    assert last.totals == {
        "items_encoded": 2,
        "items_cached": 2,
        "crops_encoded": 22,  # and the picture in two sizes
        "frames_decoded": 21,
        "evictions/memory": 0,
        "hits/memory": 40,
        "misses/memory": 21,
    }
    assert last.now["items_open"] == last.now["items_waiting"] == 0
    assert last.now["bytes/memory"] > 20 * ROW_BYTES
    encoder.run()
    assert encoder.reporter.of(m.WorkCounted)[-1] is last, "nothing has changed"


def test_what_an_owner_has_decoded_is_not_decoded_again_when_others_help(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=40, size=(SIDE * 8, SIDE * 8), gop=5)
    ref = MediaRef(
        modality="video",
        path=str(path),
        digest="0" * 64,
        source="clip",
        options=MediaOptions(num_frames=40),
    )
    folder = tmp_path / "frames"
    folder.mkdir()
    pool = SandboxPool(folder, MediaLimits(), processes=1)
    try:
        encoder = Encoder(tmp_path)
        tools = encoder.handler._tools
        object.__setattr__(tools, "sandbox", pool)
        frames = Frames(ref, Known(pool.plan(ref)), range(40), tools)
        while not frames._segments.is_ready(whole=True):
            frames._segments.wait()
        frames.change(range(24))
        while frames.left:
            frames.pixels(Clock())
        assert pool.counts()[0]["frames_decoded"] == 40, "all of it was decoded before, once"
        frames.change([30, 31])
        frames.pixels(Clock())
        assert frames.positions == (30, 31)
        assert pool.counts()[0]["frames_decoded"] == 42
        frames.close()
        assert pool.counts()[1] == {"frames_to_decode": 0, "decoded_ahead_bytes": 0}
    finally:
        pool.close()


@pytest.mark.parametrize("salts", [1, 30])
def test_a_flood_of_media_evicts_only_its_senders(tmp_path: Path, salts: int) -> None:
    """R18: neither by many files nor under many salts of one tenant."""
    encoder = Encoder(tmp_path, cache_bytes=100 * ROW_BYTES, frames=8)
    quiet = [f"q{number}" for number in range(4)]
    for name in quiet:
        encoder.ask(name, digest=name, salt="quiet/x")
    encoder.run()
    for number in range(30):
        encoder.ask(f"l{number}", digest=f"l{number}", salt=f"loud/{number % salts}")
        encoder.run()
    for name in quiet:
        encoder.ask(f"{name} again", digest=name, salt="quiet/x")
    encoder.run()
    assert all(whole(encoder, f"{name} again").whole.cached_tokens == 8 * FRAME_TOKENS for name in quiet)


def test_what_a_lost_worker_did_stays_counted() -> None:
    world = World(*EEPD)
    encoders = [worker for worker in world.workers.values() if worker.roles == (m.Role.ENCODE,)]
    for worker, frames in zip(encoders, (3, 4), strict=True):
        for total in (1, frames):
            now = {"items_open": 1, "bytes/disk": 50 + total}  # one file
            counted = m.WorkCounted(totals={"frames_decoded": total}, now=now)
            world.dispatcher.handle(worker.name, worker.upward(counted))
    assert world.dispatcher.work_counts() == ({"frames_decoded": 7}, {"items_open": 2, "bytes/disk": 54})
    world.kill(encoders[0])
    assert world.dispatcher.work_counts() == ({"frames_decoded": 7}, {"items_open": 1, "bytes/disk": 54})
