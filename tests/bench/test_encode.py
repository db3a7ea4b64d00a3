"""The encode benchmark: what it asks of which side, what it checks, gates and reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
from typer.testing import CliRunner

from mmserve import cli
from mmserve.bench import deployment, encode, media
from mmserve.bench.deployment import Deployment
from mmserve.bench.encode import BALANCED, Plan, run
from mmserve.bench.geometry import checkpoint
from mmserve.config import ServeConfig
from mmserve.errors import BadRequest, MMServeError
from mmserve.media.limits import MediaLimits
from mmserve.media.video import decode_frames, plan_video
from mmserve.offline.runtime import Runtime
from mmserve.request import (
    CompletionOutput,
    FinishReason,
    MediaOptions,
    Methods,
    RequestOutput,
    Timings,
    Usage,
)
from mmserve.sampling import Logprob

SMALL = Plan(size=(64, 48), seconds=1, rate=12)
VIDEO = media.Plan(size=(64, 48), seconds=1, rate=12)


class Scripted:
    """A deployment that answers at once: how long it says it took depends on how it was started."""

    started: ClassVar[list[Scripted]] = []
    decode_ms: ClassVar[float] = 3e3  # of stages that take 3 s each otherwise

    def __init__(self, folder: Path, *, encoders: int = 1, overlap: bool = True, dtype: str = "auto") -> None:
        self.encoders, self.overlap, self.dtype = encoders, overlap, dtype
        self.asked: list[dict[str, Any]] = []
        self.is_closed = False
        self.started.append(self)

    def ask(
        self,
        video: dict[str, Any],
        *,
        options: MediaOptions | None = None,
        methods: Methods | None = None,
        tokens: int = 1,
    ) -> RequestOutput:
        content = video["video"]
        if isinstance(content, str):
            content = Path(content).read_bytes()
        self.asked.append({"content": content, "options": options, "methods": methods, "tokens": tokens})
        stages = {"decode": self.decode_ms - 500, "preprocess": 500.0, "encode": 3e3, "prefill": 3e3}
        ttft = sum(stages.values()) * (0.6 if self.overlap and self.encoders == 1 else 1.0)
        if self.encoders == 2:
            ttft = 6e3  # 3 s of it in prefill
        return RequestOutput(
            request_id="r",
            outputs=(
                CompletionOutput(
                    text="",
                    token_ids=self.token_ids(tokens),
                    finish_reason=FinishReason.LENGTH,
                    logprobs=tuple({token: self.logprob()} for token in self.token_ids(tokens)),
                ),
            ),
            prompt_token_ids=(),
            usage=Usage(),
            timings_ms=Timings(**stages, ttft=ttft),
            media=(),
            methods=Methods(),
        )

    def token_ids(self, tokens: int) -> tuple[int, ...]:
        return (7,) * tokens

    def logprob(self) -> Logprob:
        return Logprob(logprob=-1.0, rank=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[Scripted]:
    monkeypatch.setattr(Scripted, "started", [])
    monkeypatch.setattr(encode, "Deployment", Scripted)
    monkeypatch.setattr(encode, "usable_cores", lambda: 2)
    return Scripted.started


def contents(side: Scripted) -> set[bytes]:
    return {bytes(one["content"]) for one in side.asked}


def test_overlap_is_measured_beside_the_same_without(
    sides: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    plan = replace(SMALL, parts=("overlap",), rounds=2, cache_dir=tmp_path)
    monkeypatch.setattr(encode, "checkpoint", lambda *_: tmp_path)
    report = json.loads(json.dumps(run(plan, told.append)))
    assert report["bench"] == "encode"
    assert (report["settings"]["cores"], report["settings"]["threads"]) == (2, 1)
    gained, bound = report["rows"]
    assert (gained["metric"], gained["ours"], gained["peer"], gained["runs"]) == ("overlap", 5.4, 9.0, 2)
    assert (gained["ratio"], gained["gate"], gained["passed"]) == (1.667, 1.429, True)
    assert gained["stages_s"] == {"decode": 3.0, "encode": 3.0, "prefill": 3.0}
    assert (bound["metric"], bound["peer"]) == ("overlap_bound", 4.5), "three stages on two cores"
    assert "gate" not in bound
    assert [(side.dtype, side.overlap) for side in sides] == [
        ("float32", True),
        ("float32", False),
        ("auto", True),
        ("auto", False),
    ]
    assert all(side.is_closed for side in sides)
    assert [one["tokens"] for side in sides[:2] for one in side.asked] == [16, 16], "checked before"
    with_, without = sides[2:]
    assert contents(with_) == contents(without)
    assert len(contents(with_)) == len(with_.asked) == 3, "no video is seen twice"
    assert {one["options"] for one in with_.asked} == {MediaOptions(num_frames=128)}
    assert any("decode 33%, encode 33%, prefill 33% of 9 s" in line for line in told)


def test_other_geometries_are_held_to_their_bound(sides: list[Scripted], tmp_path: Path) -> None:
    plan = replace(SMALL, parts=("overlap",), geometry="nano", rounds=1, cache_dir=tmp_path)
    gained, bound = run(plan)["rows"]
    assert "gate" not in gained
    assert (bound["ratio"], bound["gate"], bound["passed"]) == (0.8333, 0.8696, False)


@pytest.mark.parametrize("decode_ms", [1.5e3, 6e3])
def test_unbalanced_stages_are_refused(
    sides: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode_ms: float
) -> None:
    monkeypatch.setattr(Scripted, "decode_ms", decode_ms)
    plan = replace(SMALL, parts=("overlap",), cache_dir=tmp_path)
    with pytest.raises(MMServeError, match=r"each stage of ov-balanced to take 25% to 45%.*decode"):
        run(plan)
    assert max(len(side.asked) for side in sides) == 1, "nothing was timed"


def test_two_encode_workers_are_measured_beside_one(
    sides: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "decode_ms", 500.0)
    plan = Plan(parts=("workers",), geometry="nano", frames=4, rounds=2, cache_dir=tmp_path)
    (row,) = run(plan)["rows"]
    two, one = sides
    assert (two.encoders, one.encoders) == (2, 1)
    assert contents(two) == contents(one)
    assert len(contents(two)) == len(two.asked) == 3
    assert {ask["content"].shape for ask in two.asked} == {(4, 56, 56, 3)}
    assert {ask["methods"].prune for ask in two.asked} == {"uniform"}
    # without prefill: 3 s of 6 s, and 0.9 s of 3.9 s as no stage overlaps another here
    assert (row["metric"], row["ours"], row["peer"]) == ("workers", 3.0, 0.9)
    assert "gate" not in row, "of another geometry"


def test_two_encode_workers_have_a_gate(
    sides: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("nano", 0, tmp_path)
    monkeypatch.setattr(encode, "checkpoint", lambda *_: folder)
    monkeypatch.setattr(encode, "WORKERS_FRAMES", 2)
    (row,) = run(Plan(parts=("workers",), rounds=1))["rows"]
    assert (row["gate"], row["geometry"], row["frames"]) == (1.538, "ov-mini", 2)


def other_logprob(side: Scripted) -> Logprob:
    return Logprob(logprob=-1.0 if side is Scripted.started[0] else -1.1, rank=1)


@pytest.mark.parametrize("part", ["overlap", "workers"])
def test_no_speed_is_reported_for_other_log_probabilities(
    sides: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(Scripted, "logprob", other_logprob)
    plan = replace(SMALL, parts=(part,), geometry="nano", frames=2, cache_dir=tmp_path)
    with pytest.raises(MMServeError, match=r"within 0\.002, but they are 0\.1 off"):
        run(plan)


@pytest.mark.parametrize("part", ["overlap", "workers"])
def test_no_speed_is_reported_for_other_tokens(
    sides: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(Scripted, "token_ids", lambda self, tokens: (id(self),) * tokens)
    plan = replace(SMALL, parts=(part,), geometry="nano", frames=2, cache_dir=tmp_path)
    with pytest.raises(MMServeError, match="Expected the same tokens"):
        run(plan)
    assert all(side.is_closed for side in sides)


def test_numbered_files_differ_and_decode_alike(tmp_path: Path) -> None:
    path = media.video(replace(VIDEO, cache_dir=tmp_path), 12, lambda line: None)
    limits, shown, digests = MediaLimits(), [], set()
    for number in (1, 2):
        with encode._numbered(path.read_bytes(), number) as copy:
            plan = plan_video(copy, MediaOptions(num_frames=4), limits)
            shown.append(np.stack([frame for _, frame in decode_frames(copy, plan, range(4))]))
            digests.add(copy.read_bytes())
    np.testing.assert_array_equal(shown[0], shown[1])
    assert len(digests) == 2


def test_a_deployment_answers_the_same_without_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has the libraries loaded already."""
    configs: list[ServeConfig] = []

    def start(config: ServeConfig, *, in_process: bool) -> Runtime:
        assert not in_process
        configs.append(config)
        return Runtime(config, in_process=True)

    monkeypatch.setattr(deployment, "Runtime", start)
    folder = checkpoint("nano", 0, tmp_path)
    path = media.video(replace(VIDEO, cache_dir=tmp_path), 12, lambda line: None)
    answers = []
    for overlap in (True, False):
        with Deployment(folder, encoders=1, overlap=overlap) as side:
            output = side.ask({"video": str(path)}, options=MediaOptions(num_frames=12), tokens=4)
            answers.append((output.outputs[0].token_ids, output.usage.visual_tokens))
            assert output.media[0].frames == 12
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == 4
    assert [config.overlap for config in configs] == [True, False]
    assert {(config.threads, config.epd) for config in configs} == {(1, (1, 1, 1))}


def test_a_wrong_plan_is_refused() -> None:
    with pytest.raises(BadRequest, match="a part of overlap, workers"):
        Plan(parts=("decode",))
    with pytest.raises(BadRequest, match=BALANCED):
        Plan(geometry="ov-huge")
    for arguments in (["--parts", "decode"], ["--geometry", "ov-huge"], ["--rounds", "0"]):
        assert CliRunner().invoke(cli.app, ["bench", "encode", *arguments]).exit_code == 2


def test_the_command_takes_what_gates_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def fake(plan: Plan, tell: object) -> dict[str, Any]:
        plans.append(plan)
        return {"bench": "encode", "rows": []}

    monkeypatch.setattr(encode, "run", fake)
    done = CliRunner().invoke(cli.app, ["bench", "encode", "--parts", "overlap", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"bench": "encode", "rows": []}
    assert plans == [Plan(parts=("overlap",))]
