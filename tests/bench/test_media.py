"""The whole media benchmark on very small videos: what it measures, checks and reports."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mmserve import cli
from mmserve.bench import media
from mmserve.bench.media import Plan, run, seek_each, sequential, transformers, video
from mmserve.errors import BadRequest, MMServeError

SMALL = Plan(rounds=1, backends=("pyav", "decord"), gops=(4,), frames=(3,), size=(64, 48), seconds=1, rate=12)


def test_the_whole_bench(tmp_path: Path) -> None:
    told: list[str] = []
    before = os.sched_getaffinity(0)
    report = json.loads(json.dumps(run(replace(SMALL, cache_dir=tmp_path), told.append)))
    assert report["bench"] == "media"
    assert report["settings"]["cores"] == 1
    assert [row["metric"] for row in report["rows"]] == ["gop4_frames3_pyav", "gop4_frames3_decord"]
    for row in report["rows"]:
        assert set(row["peers"]) == {
            "seek_each",
            "sequential",
            "transformers_pyav",
            "transformers_decord",
        }
        assert row["peer"] == min(row["peers"].values())
        assert row["peers"][row["peer_is"]] == row["peer"]
        assert row["passed"] == (row["ratio"] >= row["gate"])
        assert (row["unit"], row["runs"]) == ("s", 1)
    assert os.sched_getaffinity(0) == before
    assert any("sequential" in line for line in told)


def test_all_ways_show_the_same_frames(tmp_path: Path) -> None:
    path = video(replace(SMALL, cache_dir=tmp_path), 5, lambda line: None)
    truth = sequential(path, 4)
    for read in (seek_each, transformers("pyav")):
        np.testing.assert_array_equal(np.stack(read(path, 4)), np.stack(truth))


def test_a_video_is_made_once(tmp_path: Path) -> None:
    told: list[str] = []
    plan = replace(SMALL, cache_dir=tmp_path)
    assert video(plan, 4, told.append) == video(plan, 4, told.append)
    assert len(told) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_other_frames_end_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "seek_each", lambda path, count: sequential(path, count)[::-1])
    with pytest.raises(MMServeError, match="seek_each to show the same frames"):
        run(replace(SMALL, cache_dir=tmp_path, backends=("pyav",)))


def test_unknown_backends_are_named() -> None:
    with pytest.raises(BadRequest, match="a backend of pyav, decord"):
        Plan(backends=("opencv",))
    done = CliRunner().invoke(cli.app, ["bench", "media", "--backends", "opencv"])
    assert done.exit_code == 2
