"""Prompts under sparse patterns in a language worker: chunks, batches, caches, groups of layers, reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from torch import Tensor

from mmserve import messages as m
from mmserve.attention import profile as profiles
from mmserve.attention import sparse
from mmserve.attention.base import PATTERNS, PROFILE, load_pattern
from mmserve.attention.selection import PageSelection, Selected
from mmserve.request import Methods, Option
from mmserve.sampling import SamplingParams
from mmserve.workers.numbering import FrameNumbers
from tests.workers.fakes import IMAGE, VIDEO, Engine, tiny_decoder, whole

LONG = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPT = (1, 2, 6, 9, 4, VIDEO, 3, IMAGE, 4, 5)
SPARSE = Methods(attention="a_shape", attention_options={"sink": 2, "local": 1}, attention_dense_below=0)
UNLIMITED = 1 << 20


@pytest.fixture(autouse=True)
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of everything is run as it is too."""
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 2.0)


def everything(name: str) -> Methods:
    """A pattern by which every row sees all that dense attention does."""
    pattern = load_pattern(name).everything()
    options: dict[str, Option] = {
        field.name: value
        for field in dataclasses.fields(pattern)
        if field.name != PROFILE and (value := getattr(pattern, field.name)) != field.default
    }
    return Methods(attention=name, attention_options=options, attention_dense_below=0)


def media(engine: Engine) -> tuple[m.PromptItem, ...]:
    """A video of 12 frames in two parts and a newline, and an image."""
    first = engine.part(48, seed=1, frame=np.repeat(range(6), 8).tolist())
    second = engine.part(49, seed=1, first=48, frame=[*np.repeat(range(6), 8).tolist(), -1])
    return whole(first, second), engine.item(40, seed=2)


def answers(
    directory: Path, methods: Methods, *, budget: int = UNLIMITED, layers: int = 2
) -> dict[str, list[int]]:
    """Three prompts of different lengths at once, then a second question about the video."""
    engine = Engine(directory, decoder=tiny_decoder(layers=layers), token_budget=budget, pages=2000)
    engine.prefill("mixed", PROMPT, media(engine), sampling=LONG, methods=methods)
    engine.prefill("text", (9, 8, 7, 6, 5, 4), sampling=LONG, methods=methods)
    engine.prefill("video", (VIDEO, 3), media(engine)[:1], sampling=LONG, methods=methods)
    engine.run()
    engine.prefill("again", (VIDEO, 8, 7), media(engine)[:1], sampling=LONG, methods=methods)
    engine.finish()
    assert not engine.reporter.of(m.RequestFailed)
    assert engine.used_pages == 0
    engine.check()
    # a method inside the model shares nothing behind the text
    is_shared = methods.prune == "none"
    assert (prefilled(engine, "again").cached_slots > 80) == is_shared
    return {name: engine.answer(name) for name in ("mixed", "text", "video", "again")}


def prefilled(engine: Engine, name: str) -> m.PromptPrefilled:
    return next(e for e in engine.reporter.of(m.PromptPrefilled) if e.request_id == name)


def sparsely(directory: Path, *, methods: Methods = SPARSE, report: bool = False) -> m.PromptPrefilled:
    engine = Engine(directory, pages=2000)
    command = engine.prefill("p", PROMPT, media(engine), sampling=LONG, methods=methods)
    if report:
        engine.handler._commands.clear()
        engine.handler.handle(msgspec.structs.replace(command, report_attention=True))
    engine.finish()
    assert not engine.reporter.of(m.RequestFailed)
    return prefilled(engine, "p")


@pytest.mark.parametrize("name", PATTERNS)
def test_to_see_everything_is_to_be_dense(tmp_path: Path, name: str) -> None:
    dense = answers(tmp_path, Methods())
    for budget in (23, 64, UNLIMITED):
        assert answers(tmp_path, everything(name), budget=budget) == dense


def test_rows_that_were_dropped_between_layers_are_not_there_to_be_seen(tmp_path: Path) -> None:
    dense = answers(tmp_path, Methods(prune="fastv", keep=0.5), layers=4)
    seeing_all = msgspec.structs.replace(everything("a_shape"), prune="fastv", keep=0.5)
    assert answers(tmp_path, seeing_all, layers=4, budget=50) == dense
    assert answers(tmp_path, msgspec.structs.replace(SPARSE, prune="fastv", keep=0.5), layers=4)


def test_a_sparse_prompt_equals_itself_whatever_is_beside_it(tmp_path: Path) -> None:
    engine = Engine(tmp_path, pages=2000, token_budget=64)
    engine.prefill("p", PROMPT, media(engine), sampling=LONG, methods=SPARSE)
    engine.finish()
    busy = Engine(tmp_path, pages=2000, token_budget=64)
    busy.prefill("p", PROMPT, media(busy), sampling=LONG, methods=SPARSE)
    busy.prefill("other", (5, 4, VIDEO, 9), media(busy)[:1], sampling=LONG)
    busy.finish()
    assert busy.answer("p") == engine.answer("p")


@pytest.mark.parametrize(
    "changed",
    [
        {"attention": "dense", "attention_options": {}, "attention_dense_below": None},
        {"attention_options": {"sink": 3, "local": 1}},
        {"attention_dense_below": 20},
    ],
)
def test_what_one_pattern_computed_is_not_anothers_beginning(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    engine = Engine(tmp_path, pages=2000)
    for number, methods in enumerate((SPARSE, msgspec.structs.replace(SPARSE, **changed), SPARSE)):
        engine.prefill(f"p{number}", PROMPT, media(engine), sampling=LONG, methods=methods)
        engine.run()
    assert [prefilled(engine, f"p{number}").cached_slots > 0 for number in range(3)] == [False, False, True]


def test_density_is_reported_for_every_layer(tmp_path: Path) -> None:
    assert sparsely(tmp_path, methods=Methods()).attention_density == (1.0, 1.0)
    frames = msgspec.structs.replace(SPARSE, attention_options={"sink": 2, "local_frames": 1})
    for density in sparsely(tmp_path, methods=frames).attention_density:
        assert 0.1 < density < 0.4
    dense = sparsely(tmp_path, methods=msgspec.structs.replace(frames, attention_dense_below=1000))
    assert dense.attention_density == (1.0, 1.0)
    assert dense.attention is None


def test_what_is_lost_is_measured_where_somebody_asks(tmp_path: Path) -> None:
    frames = msgspec.structs.replace(SPARSE, attention_options={"sink": 2, "local_frames": 1})
    event = sparsely(tmp_path, methods=frames, report=True)
    assert event.first == sparsely(tmp_path, methods=frames).first
    assert event.attention is not None
    assert all(0.05 < recall < 0.95 for recall in event.attention.recall)
    assert len(event.attention.attention) == event.attention.side**2 == len(event.attention.seen)
    dense = sparsely(tmp_path, methods=Methods(), report=True)
    assert dense.attention is not None
    assert dense.attention.recall == (1.0, 1.0)
    assert dense.attention_density == (1.0, 1.0)


def test_wrong_settings_fail_the_request_alone(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    for options in ({"sinc": 1}, {"profile": "/etc/passwd"}, {"sink": -1}):
        wrong = Methods(attention="a_shape", attention_options=options)  # type: ignore[arg-type]  # dict of one kind
        engine.prefill("p", (1, 2, 3), methods=wrong)
        engine.run()
    failed = engine.reporter.of(m.RequestFailed)
    assert [event.code for event in failed] == ["bad_request"] * 3


def test_settings_for_another_model_fail_the_request_alone(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    head = profiles.Head(**dict.fromkeys(profiles.LINES, profiles.Lines(sink=1, local=2)))  # type: ignore[arg-type]
    inputs = profiles.Inputs(digest="0", prompts=1, tokens=1)
    file.write_text(
        profiles.AttentionProfile(
            model="other", inputs=inputs, budget=0.5, costs="counted", heads=((head,) * 4,) * 3
        ).to_json()
    )
    engine = Engine(tmp_path, pages=2000)
    engine.prefill("fine", PROMPT, media(engine), sampling=LONG, methods=SPARSE)
    wrong = (
        Methods(attention="xattention", attention_options={"thresholds": "0.5,0.5,0.5"}),
        Methods(attention="mminference", attention_profile=str(file)),
    )
    for number, methods in enumerate(wrong):
        methods = msgspec.structs.replace(methods, attention_dense_below=0)
        engine.prefill(f"p{number}", PROMPT, media(engine), sampling=LONG, methods=methods)
    engine.finish()
    failed = engine.reporter.of(m.RequestFailed)
    assert sorted((event.request_id, event.code) for event in failed) == [
        ("p0", "bad_request"),
        ("p1", "bad_request"),
    ]
    assert len(engine.answer("fine")) == 8


def test_frames_are_counted_over_all_items() -> None:
    numbers = FrameNumbers()
    assert numbers.of_part(0, np.array([0, 0, 1, 3], np.int32)).tolist() == [0, 0, 1, 2]
    assert numbers.of_part(0, np.array([0, 1, 1, -1], np.int32)).tolist() == [3, 4, 4, 4]
    assert numbers.of_part(1, np.array([-1, -1], np.int32)).tolist() == [5, 5]
    assert numbers.of_part(2, np.array([-1], np.int32)).tolist() == [6]
    assert numbers.of_part(3, np.array([], np.int32)).tolist() == []
    assert numbers.of_part(3, np.array([0], np.int32)).tolist() == [7]
    # a newline that comes alone
    assert numbers.of_part(3, np.array([-1], np.int32)).tolist() == [7]


QUEST = Methods(attention="quest", attention_options={"budget": 12, "dense_layers": 1})


def test_answers_read_only_the_pages_that_may_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    select = PageSelection.select

    def noted(self: PageSelection, layer: int, q: Tensor) -> Selected | None:
        found = select(self, layer, q)
        if found is not None:
            read.append(int(found.lengths.max()))
        return found

    monkeypatch.setattr(PageSelection, "select", noted)
    found = answers(tmp_path, QUEST)
    assert read
    assert max(read) <= 12
    assert answers(tmp_path, QUEST, budget=23) == found


def test_what_answers_read_leaves_the_prompt_as_it_is(tmp_path: Path) -> None:
    engine = Engine(tmp_path, pages=2000)
    for name, methods in (("dense", Methods()), ("quest", QUEST)):
        engine.prefill(name, PROMPT, media(engine), sampling=LONG, methods=methods)
        engine.finish()
    assert engine.answer("dense")[0] == engine.answer("quest")[0]
    assert prefilled(engine, "quest").attention_density == (1.0, 1.0)
