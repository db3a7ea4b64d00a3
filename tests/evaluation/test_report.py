"""The evaluation's arithmetic, its sweep, and a whole run on a stand-in pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from mmserve.errors import BadRequest, MediaError
from mmserve.evaluation import report, run
from mmserve.evaluation.outputs import Outputs
from mmserve.evaluation.report import Geometry, Outcome
from mmserve.methods import NAMES, WITH_WEIGHTS, Kind
from mmserve.request import MediaOptions, Methods, Timings, Usage
from tests.fake_llm import FakeLLM

GEOMETRY = Geometry(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4)
RUN = {"weights": "one"}
KINDS: tuple[Kind, Kind] = ("prune", "kv")
PRUNED = Methods(prune="holitom", keep=0.25)


def flops(*lengths: int) -> float:
    return GEOMETRY.prefill_flops(lengths)


def outcome(clip: str, kind: str, correct: bool, kept: int, ttft: float, tokens: int = 3) -> Outcome:
    usage = Usage(
        prompt_tokens=110,
        completion_tokens=tokens,
        visual_tokens=100,
        visual_tokens_kept=kept,
        kv_bytes=10 + kept,
    )
    return Outcome(
        question_id=kind,
        kind=kind,
        clip=clip,
        correct=correct,
        usage=usage,
        timings_ms=Timings(ttft=ttft, generate=8.0),
    )


DENSE = [
    outcome("1", "a", True, 100, 500.0),
    outcome("2", "a", True, 100, 10.0),
    outcome("3", "b", True, 100, 10.0),
]
OURS = [
    outcome("1", "a", True, 25, 50.0),
    outcome("2", "a", False, 25, 5.0),
    outcome("3", "b", True, 25, 5.0),
]


def test_the_dense_row_is_its_own_measure() -> None:
    row = report.row("s", Methods(), DENSE, DENSE, GEOMETRY)
    assert row["dense"] is True
    assert row["accuracy"] == 1.0
    assert row["stderr"] == 0.0
    ratios = ("accuracy_kept", "visual_tokens_kept_ratio", "flops_ratio", "ttft_ratio", "decode_ratio")
    assert [row[name] for name in (*ratios, "kv_bytes_ratio")] == [1.0] * 6


def test_a_row_is_measured_against_the_dense_run() -> None:
    row = report.row("s", PRUNED, OURS, DENSE, GEOMETRY)
    assert row["dense"] is False
    assert row["settings"]["keep"] == 0.25
    assert (row["n"], row["failed"]) == (3, 0)
    assert row["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["accuracy_kept"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["stderr"] == pytest.approx((2 / 9 / 2) ** 0.5, abs=1e-4)
    assert row["accuracy_difference"] == pytest.approx(-1 / 3, abs=1e-4)
    assert row["difference_stderr"] == row["stderr"]
    assert row["p_value"] == 1.0  # one question of three differs
    assert row["visual_tokens_kept_ratio"] == 0.25
    assert row["attention_density"] == 1.0
    assert row["kv_bytes_ratio"] == pytest.approx(35 / 110, abs=1e-4)
    assert row["by_kind"] == {"a": 0.5, "b": 1.0}
    assert row["flops_ratio"] == round(flops(35, 35) / flops(110, 110), 4)
    # the slow first request moves no median
    assert row["ttft_ratio"] == 0.5


def test_a_method_between_layers_saves_what_its_layers_do_not_see() -> None:
    inner = [
        replace(one, usage=msgspec.structs.replace(one.usage, visual_tokens_by_layer=(100, 20)))
        for one in DENSE
        if one.usage is not None
    ]
    row = report.row("s", Methods(prune="fastv", keep=0.25), inner, DENSE, GEOMETRY)
    assert row["visual_tokens_kept_ratio"] == 1.0
    assert row["flops_ratio"] == round(flops(110, 30) / flops(110, 110), 4)
    assert flops(110, 30) > flops(70, 70), "pairs grow with the square: the mean would say less"
    alike = [
        replace(one, usage=msgspec.structs.replace(one.usage, visual_tokens_layer_mean=40.2))
        for one in DENSE
        if one.usage is not None
    ]
    row = report.row("s", Methods(prune="cdpruner", keep=0.4), alike, DENSE, GEOMETRY)
    assert row["flops_ratio"] == round(flops(50, 50) / flops(110, 110), 4)


def test_arithmetic_of_a_prefill_counts_weights_and_pairs() -> None:
    weights = 8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16
    assert flops(1, 1) == 2 * (2 * weights + 4 * 2 * 4)
    # three times the tokens: three times the weights, six times the causal pairs
    assert flops(3, 3) == 2 * (2 * weights * 3 + 4 * 2 * 4 * 6)
    assert 2 * flops(1, 3) == flops(1, 1) + flops(3, 3)


@pytest.mark.parametrize("nested", [False, True])
def test_geometry_from_a_model_configuration(nested: bool) -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = {"text_config": text} if nested else text
    assert Geometry.from_config(config) == Geometry(
        layers=2, hidden=8, intermediate=16, heads=2, kv_heads=2, head_dim=4
    )


def test_missing_measurements_are_null() -> None:
    failed = [Outcome(question_id="q", kind="a", clip="1", correct=False)]
    row = report.row("s", PRUNED, failed, failed, GEOMETRY)
    assert row["failed"] == 1
    assert row["accuracy"] == 0.0
    for name in ("accuracy_kept", "visual_tokens_kept_ratio", "flops_ratio", "ttft_ratio", "decode_ratio"):
        assert row[name] is None
    assert report.markdown([row]).splitlines()[2].count(" - ") >= 5
    # one token has no time between tokens
    single = [outcome("1", "a", True, 100, 1.0, tokens=1)]
    assert report.row("s", Methods(), single, single, GEOMETRY)["decode_ratio"] is None


def test_the_table_is_markdown() -> None:
    rows = [report.row("s", m, o, DENSE, GEOMETRY) for m, o in ((Methods(), DENSE), (PRUNED, OURS))]
    lines = report.markdown(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "none (dense)" in lines[2]
    assert "66.7 ± 33.3 % | -33.3 ± 33.3 | 1 |" in lines[3]
    with_failed = [*OURS[:2], replace(OURS[2], usage=None)]
    row = report.row("s", PRUNED, with_failed, DENSE, GEOMETRY)
    assert "| 3 (1 failed) |" in report.markdown([row])


def sweep(**given: str) -> list[Methods]:
    plain: dict[str, str | None] = {"prune": "none", "keep": None, "attention": "dense", "kv": "none"}
    plain |= {"kv_budget": None, "kv_dtype": "auto"}
    return list(run.sweep(**(plain | given)))  # type: ignore[arg-type]  # values are of the right kinds


def test_a_sweep_begins_with_the_dense_run() -> None:
    assert sweep() == [Methods()]
    assert sweep(prune="holitom") == [Methods(), PRUNED]
    assert sweep(prune="holitom,none", keep="0.5,0.25") == [
        Methods(),
        Methods(prune="holitom", keep=0.5),
        PRUNED,
    ]


def test_a_sweep_is_every_combination_once() -> None:
    settings = sweep(prune="all", keep="all", kv="all", kv_budget="32,0.5")
    # what needs a file has to be named
    prunes, policies = (set(NAMES[kind]) - set(WITH_WEIGHTS) for kind in KINDS)
    shares = 3 * (len(prunes) - 2) + 2  # dense and carriers keep what they keep
    assert len(settings) == len(set(settings)) == shares * (1 + 2 * (len(policies) - 1))
    assert settings[0] == Methods()
    assert Methods(prune="uniform", keep=0.1, kv="snapkv", kv_budget=32) in settings


@pytest.mark.parametrize(
    "given",
    [
        {"keep": "0.5"},
        {"kv_budget": "0.5"},
        {"prune": "holitm"},
        {"prune": "holitom", "keep": "x"},
        {"prune": "holitom", "keep": "1.5"},
        {"kv": "snapkv", "kv_budget": "0"},
        {"prune": ""},
    ],
)
def test_a_wrong_sweep_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(BadRequest):
        sweep(**given)


def test_suites_by_name() -> None:
    assert run.suite_names("clipworld-basic,clipworld-basic") == ("clipworld-basic",)
    assert len(run.suite_names("all")) == 4
    with pytest.raises(BadRequest):
        run.suite_names("clipworld")


def test_a_run_reports_every_suite_and_setting(tmp_path: Path) -> None:
    opened: list[FakeLLM] = []

    def open_llm(methods: Methods) -> FakeLLM:
        # the pruned run is wrong about everything
        opened.append(FakeLLM(lambda text: "red" if methods == Methods() else "?", methods))
        return opened[-1]

    plan = run.Plan(suites=("clipworld-basic", "clipworld-stream"), sweep=(Methods(), PRUNED), limit=3)
    advanced: list[None] = []
    with Outputs(tmp_path / "outputs.jsonl", RUN) as outputs:
        rows = run.evaluate(
            plan, open_llm, GEOMETRY, outputs=outputs, on_answer=lambda: advanced.append(None)
        )
    assert [(row["suite"], row["dense"]) for row in rows] == [
        ("clipworld-basic", True),
        ("clipworld-basic", False),
        ("clipworld-stream", True),
        ("clipworld-stream", False),
    ]
    assert rows[1]["visual_tokens_kept_ratio"] == 0.25
    assert rows[1]["accuracy"] == 0.0
    assert len(opened) == 4
    assert all(llm.closed for llm in opened)
    assert opened[0].options[0] == MediaOptions(num_frames=64)
    lines = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
    assert len(lines) == len(advanced) == 12
    assert {"suite", "settings", "id", "question", "expected", "answer", "correct"} <= lines[0].keys()


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    target = tmp_path / "outputs.jsonl"
    plan = run.Plan(suites=("clipworld-basic",), sweep=(Methods(), PRUNED), limit=3)
    with Outputs(target, RUN) as outputs:
        first = run.evaluate(plan, lambda methods: FakeLLM(methods=methods), GEOMETRY, outputs=outputs)
    whole = target.read_text().splitlines(keepends=True)
    target.write_text("".join(whole[:4]) + whole[4][:20])  # stopped while it wrote the fifth of six
    opened: list[Methods] = []
    advanced: list[None] = []

    def open_llm(methods: Methods) -> FakeLLM:
        opened.append(methods)
        return FakeLLM(methods=methods)

    with Outputs(target, RUN) as outputs:
        again = run.evaluate(
            plan, open_llm, GEOMETRY, outputs=outputs, on_answer=lambda: advanced.append(None)
        )
    assert opened == [PRUNED]
    assert len(advanced) == 6
    assert again == first
    assert [json.loads(line)["id"] for line in target.read_text().splitlines()] == [
        json.loads(line)["id"] for line in whole
    ]


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    target = tmp_path / "outputs.jsonl"
    plan = run.Plan(suites=("clipworld-basic",), sweep=(Methods(),), limit=2)

    def failed_of(open_llm: Callable[[Methods], FakeLLM]) -> int:
        with Outputs(target, RUN) as outputs:
            (row,) = run.evaluate(plan, open_llm, GEOMETRY, outputs=outputs)
        return int(row["failed"])

    assert failed_of(lambda _: FakeLLM(lambda _: MediaError("x"))) == 2
    assert failed_of(lambda _: FakeLLM()) == 0


@pytest.mark.parametrize("line", ['{"id": "x"}', "what", '{"run": {"weights": "other"}, "suite": "s"}'])
def test_a_file_of_something_else_is_not_continued(tmp_path: Path, line: str) -> None:
    target = tmp_path / "outputs.jsonl"
    target.write_text(line + "\n")
    with pytest.raises(BadRequest, match=r"in line 1 of|line 1 is of"):
        Outputs(target, RUN)
    assert target.read_text() == line + "\n"


def test_a_file_of_one_unfinished_line_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    target = tmp_path / "outputs.jsonl"
    target.write_text("what somebody noted")
    with pytest.raises(BadRequest, match="to end with an answer of an evaluation"):
        Outputs(target, RUN)
    assert target.read_text() == "what somebody noted"


def test_answers_of_other_weights_are_not_mixed_in(tmp_path: Path) -> None:
    target = tmp_path / "outputs.jsonl"
    with Outputs(target, RUN) as outputs:
        outputs.append(
            {"suite": "s", "settings": {}, "id": "q", "answer": "a", "usage": {}, "timings_ms": {}}
        )
    with pytest.raises(BadRequest, match="name another file"):
        Outputs(target, {"weights": "other"})


def test_the_command_writes_one_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "machine", lambda: {"cpu": "x"})
    plan = run.Plan(suites=("clipworld-basic",), sweep=(Methods(),), limit=1)
    target = tmp_path / "report.json"
    code = run.command(plan, "tiny", lambda methods: FakeLLM(), outputs=None, json_out=target)
    assert code == 0
    assert capsys.readouterr().out.startswith("| suite |")
    document = json.loads(target.read_text())
    assert document.keys() == {"machine", "commit", "rows"}
    code = run.command(
        plan, "tiny", lambda m: FakeLLM(lambda _: MediaError("x")), outputs=None, json_out=Path("-")
    )
    printed = capsys.readouterr()
    assert code == 1
    assert json.loads(printed.out)["rows"][0]["failed"] == 1
    assert "1 of 1 questions failed" in printed.err


def test_outputs_need_a_folder(tmp_path: Path) -> None:
    plan = run.Plan(suites=("clipworld-basic",), sweep=(Methods(),), limit=1)
    with pytest.raises(BadRequest, match="folder"):
        run.command(plan, "tiny", lambda m: FakeLLM(), outputs=tmp_path / "no" / "f", json_out=None)


def test_the_commit_is_a_hash_or_nothing() -> None:
    found = report.commit()
    assert found is None or len(found) == 40
