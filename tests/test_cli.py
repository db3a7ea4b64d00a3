"""The command line: what goes where, exit codes, and every command on a stand-in pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmserve import cli, options
from mmserve.config import ServeConfig
from mmserve.errors import MediaError
from mmserve.request import MediaOptions, Methods
from tests.fake_llm import FakeLLM, Reply

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class Run:
    code: int
    out: str
    err: str


class Shell:
    """Runs the command line in this process; `made` are the arguments of every pipeline it opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.reply: Reply = str.upper
        self.made: list[tuple[str, Methods, MediaOptions, tuple[int, int, int] | None]] = []
        self.llms: list[FakeLLM] = []
        monkeypatch.setattr(options, "open_llm", self._llm)

    def _llm(
        self, model: str, methods: Methods, options: MediaOptions, epd: tuple[int, int, int] | None
    ) -> FakeLLM:
        self.made.append((model, methods, options, epd))
        self.llms.append(FakeLLM(self.reply, methods))
        return self.llms[-1]

    def __call__(self, *arguments: str | Path) -> Run:
        self.monkeypatch.setattr(sys, "argv", ["mmserve", *map(str, arguments)])
        self.capsys.readouterr()
        code = cli.main()
        printed = self.capsys.readouterr()
        return Run(code, printed.out, printed.err)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"frames")
    return path


# help and usage

COMMANDS = ("ask", "batch", "eval", "serve", "doctor", "methods", "check-config")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_every_command_explains_itself(shell: Shell, arguments: list[str]) -> None:
    run = shell(*arguments, "--help")
    assert run.code == 0
    assert "Usage: mmserve" in run.out
    assert all(name in run.out for name in COMMANDS) or arguments


def test_help_needs_no_heavy_imports() -> None:
    heavy = ("torch", "transformers", "av", "httpx", "numpy", "PIL")
    code = f"import sys; from mmserve import cli; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_sampling_of_media_may_be_said_in_json(shell: Shell, clip: Path) -> None:
    more = '{"video": {"fps": 2, "start": 1, "max_pixels": 100}}'
    assert shell("ask", clip, "What?", "--media-io-kwargs", more).code == 0
    assert shell("ask", clip, "What?", "--media-io-kwargs", more, "--num-frames", "4").code == 0
    assert [made[2] for made in shell.made] == [
        MediaOptions(fps=2.0, start_s=1.0, max_pixels=100),
        MediaOptions(num_frames=4, start_s=1.0, max_pixels=100),
    ]


def test_version(shell: Shell) -> None:
    assert shell("--version").out.startswith("mmserve 0.")


def test_the_module_runs_like_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mmserve", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.split()[0]) == (0, "mmserve")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ask", "CLIP"], "question"),
        (["ask", "CLIP", "What?", "--prune", "holitm"], "holitom"),
        (["ask", "CLIP", "What?", "--kv", "x"], "snapkv"),
        (["ask", "CLIP", "What?", "--attention", "x"], "dense"),
        (["ask", "CLIP", "What?", "--kv-dtype", "x"], "auto"),
        (["ask", "CLIP", "What?", "--keep", "0"], "above 0"),
        (["ask", "CLIP", "What?", "--keep", "nan"], "above 0"),
        (["ask", "CLIP", "What?", "--keep", "0.5"], "Expected keep only with prune"),
        (["ask", "CLIP", "What?", "--prune", "evs", "--keep-image", "x/frame"], "keep_image of above 0"),
        (["ask", "CLIP", "What?", "--prune", "evs", "--prune-options", "{"], "as JSON"),
        (["ask", "CLIP", "What?", "--prune", "evs", "--prune-options", "[]"], "as an object"),
        (["ask", "CLIP", "What?", "--show-tokens", "out.mp4"], "ending with .png"),
        (["ask", "CLIP", "What?", "--show-attention", "out.mp4"], "ending with .png"),
        (["ask", "CLIP", "What?", "--attention-option", "sink"], "--attention-option as NAME=VALUE"),
        (["ask", "CLIP", "What?", "--kv-budget", "-1"], "more than 0"),
        (["ask", "CLIP", "What?", "--fps", "1", "--num-frames", "2"], "got both"),
        (["ask", "CLIP", "What?", "--fps", "0"], "above 0"),
        (["ask", "CLIP", "What?", "--num-frames", "0"], "--num-frames"),
        (["ask", "CLIP", "What?", "--media-io-kwargs", "{"], "as JSON"),
        (["ask", "CLIP", "What?", "--media-io-kwargs", '{"video": {"frames": 2}}'], "but got 'frames'"),
        (["ask", "CLIP", "What?", "--epd", "1,1"], "1,1,1"),
        (["ask", "CLIP", "What?", "--epd", "1,0,1"], "1,1,1"),
        (["ask", "CLIP", "What?", "--max-tokens", "99999999"], "--max-tokens"),
        (["ask", "CLIP", "What?", "--nonsense"], "--nonsense"),
        (["batch", "absent.jsonl", "-o", "out"], "absent.jsonl"),
        (["batch", "CLIP"], "-o"),
        (["batch", "CLIP", "-o", "out", "--shard", "3/2"], "shard"),
        (["eval", "--suite", "clipworld"], "clipworld-basic"),
        (["eval", "--suite", "clipworld-basic", "--keep", "0.5"], "--prune"),
        (["eval", "--suite", "clipworld-basic", "--prune", "holitom", "--keep", "x"], "but got 'x'"),
        (["serve", "--port", "70000"], "--port"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_is_2(shell: Shell, clip: Path, arguments: list[str], reason: str) -> None:
    run = shell(*(clip if argument == "CLIP" else argument for argument in arguments))
    assert run.code == 2
    assert reason in " ".join(run.err.replace("│", " ").split())
    assert run.out == ""
    assert not shell.made


# ask


def test_ask_prints_the_answer_and_a_line_about_it(shell: Shell, clip: Path) -> None:
    methods_given = ["--prune", "holitom", "--keep", "25", "--keep-image", "16/frame"]
    methods_given += ["--prune-options", '{"tau": 0.7}', "--kv", "snapkv"]
    methods_given += ["--kv-option", "window=8", "--kv-option", "pooling=max"]
    methods_given += ["--attention", "a_shape", "--attention-option", "sink=64"]
    methods_given += ["--attention-option", "local_frames=2", "--attention-dense-below", "0"]
    run = shell("ask", clip, "What?", *methods_given, "--fps", "2", "--epd", "1,2,1")
    assert run.code == 0
    assert run.out == "WHAT?\n"
    assert run.err.startswith("8 frames | 100 → 25 visual tokens | attention 100 % | KV")
    assert run.err.count("\n") == 1
    ((model, methods, options, epd),) = shell.made
    assert model == "tiny"
    assert methods == Methods(
        prune="holitom",
        keep=25,
        keep_image="16/frame",
        prune_options={"tau": 0.7},
        attention="a_shape",
        attention_options={"sink": 64, "local_frames": 2},
        attention_dense_below=0,
        kv="snapkv",
        kv_options={"window": 8, "pooling": "max"},
    )
    assert options == MediaOptions(fps=2)
    assert epd == (1, 2, 1)
    (llm,) = shell.llms
    assert llm.closed
    assert llm.messages[0][0]["content"][0] == {"type": "video", "video": str(clip)}


def test_ask_json_is_one_document(shell: Shell, clip: Path) -> None:
    run = shell("ask", clip, "https://example.org/a.png", "What?", "--json", "--max-tokens", "9")
    assert run.code == 0
    document = json.loads(run.out)
    assert run.err == ""
    assert document["answer"] == "WHAT?"
    assert document["finish_reason"] == "stop"
    assert document["usage"]["visual_tokens"] == 100
    assert document["media"][0]["timestamps_s"] == [0.0, 0.25]
    assert set(document["timings_ms"]) >= {"fetch", "decode", "encode", "ttft", "other", "total"}
    assert set(document["methods"]) >= {"prune", "keep", "attention", "kv", "kv_budget", "kv_dtype"}
    (llm,) = shell.llms
    assert llm.sampling[0].max_tokens == 9
    assert [part["type"] for part in llm.messages[0][0]["content"]] == ["video", "image_url", "text"]


def test_a_failure_is_one_line_and_1(shell: Shell, clip: Path, tmp_path: Path) -> None:
    run = shell("ask", tmp_path / "absent.mp4", "What?")
    assert (run.code, run.out) == (1, "")
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    shell.reply = lambda _: MediaError("The video\nis broken")
    run = shell("ask", clip, "What?", "--json")
    assert (run.code, run.out, run.err) == (1, "", "error: The video is broken\n")
    assert shell.llms[-1].closed


def test_a_forgotten_question_is_noticed(shell: Shell, clip: Path) -> None:
    run = shell("ask", clip, clip)
    assert run.code != 0
    assert "question" in run.err


def test_a_mistake_of_ours_is_one_line_too(shell: Shell, clip: Path) -> None:
    def broken(text: str) -> str:
        raise TypeError("oh")

    shell.reply = broken
    run = shell("ask", clip, "What?")
    assert (run.code, run.err) == (1, "error: TypeError: oh\n")


# batch


@pytest.fixture
def questions(clip: Path, tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": "a", "video": clip.name, "question": "one", "answer": "One"},
        {"id": "b", "video": clip.name, "question": "two", "answer": "three"},
        {"id": "c", "video": clip.name, "question": "three"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batch_answers_marks_and_continues(shell: Shell, questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    run = shell("batch", questions, "-o", answers, "--limit", "1")
    assert (run.code, run.out) == (0, "accuracy: 1/1\n")
    run = shell("batch", questions, "-o", answers, "--table")
    assert run.code == 0
    assert run.out.splitlines()[-1] == "accuracy: 1/2"
    assert "1 of 3 are answered already" in run.err
    assert [llm.asked for llm in shell.llms] == [["one"], ["two", "three"]]
    assert [row["id"] for row in rows_of(answers)] == ["a", "b", "c"]
    assert [row.get("correct") for row in rows_of(answers)] == [True, False, None]
    assert [made[3] for made in shell.made] == [(1, 1, 1), (1, 1, 1)]
    table = run.out.splitlines()
    # two header lines, whatever is alone on the first is a long name's first word
    header = [*table[0].split(), *table[1].split()]
    assert {"question", "answer", "result", "visual", "tokens", "decode", "total", "ms"} <= set(header)
    assert "right" in table[2]
    assert "100 → 100" in table[2]
    # everything is answered: no pipeline is started
    run = shell("batch", questions, "-o", answers)
    assert (run.code, run.out, len(shell.llms)) == (0, "accuracy: 1/2\n", 2)


def test_batch_reports_failures_and_tries_again_when_asked(
    shell: Shell, questions: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    shell.reply = lambda text: MediaError("broken") if text == "two" else text
    run = shell("batch", questions, "-o", answers)
    assert run.code == 1
    assert run.out == "accuracy: 1/2\n"
    assert "1 of 3 questions failed" in run.err
    shell.reply = lambda text: "three"
    assert shell("batch", questions, "-o", answers).code == 1
    assert len(shell.llms) == 1
    run = shell("batch", questions, "-o", answers, "--retry-errors")
    assert (run.code, run.out) == (0, "accuracy: 2/2\n")
    assert shell.llms[-1].asked == ["two"]
    assert [row["id"] for row in rows_of(answers)] == ["a", "b", "c"]


def test_batch_does_not_mix_methods(shell: Shell, questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    shell("batch", questions, "-o", answers, "--limit", "1")
    run = shell("batch", questions, "-o", answers, "--prune", "random", "--keep", "0.5")
    assert run.code == 1
    assert "name another file" in run.err


def test_batch_isolates_bad_rows(shell: Shell, questions: Path, tmp_path: Path) -> None:
    with questions.open("a") as file:
        file.write('{"id": "d", "video": "absent.mp4", "question": "four"}\nnot json\n')
    run = shell("batch", questions, "-o", tmp_path / "answers.jsonl")
    assert run.code == 1
    assert run.out == "accuracy: 1/2\n"
    rows = rows_of(tmp_path / "answers.jsonl")
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", "line-5"]
    assert [row.get("error", {}).get("code") for row in rows] == [
        None,
        None,
        None,
        "not_found",
        "bad_request",
    ]


def test_batch_dry_run_says_what_would_happen(shell: Shell, questions: Path, tmp_path: Path) -> None:
    run = shell("batch", questions, "--dry-run")
    assert run.code == 0
    assert "questions: 3, with an answer key: 2" in run.out
    assert "media: 1 (1 videos, 0 images; 1 files, 0 URLs)" in run.out
    with questions.open("a") as file:
        file.write('{"id": "d", "video": "absent.mp4", "question": "four"}\n')
    run = shell("batch", questions, "--dry-run", "-o", tmp_path / "answers.jsonl")
    assert run.code == 1
    assert "line 4:" in run.err
    assert "rows that cannot be asked: 1" in run.out
    assert not shell.made
    assert not (tmp_path / "answers.jsonl").exists()


def test_batch_refuses_an_id_twice(shell: Shell, questions: Path, tmp_path: Path) -> None:
    questions.write_text(questions.read_text() * 2)
    run = shell("batch", questions, "-o", tmp_path / "answers.jsonl")
    assert (run.code, run.err.count("\n")) == (1, 1)
    assert "lines 1 and 4" in run.err


def test_batch_needs_its_server(shell: Shell, questions: Path, tmp_path: Path) -> None:
    run = shell("batch", questions, "-o", tmp_path / "answers.jsonl", "--server", "http://127.0.0.1:9")
    assert run.code == 1
    assert "Expected a server at http://127.0.0.1:9" in run.err


# serve, doctor, methods, check-config


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServeConfig, bool]]:
    calls: list[tuple[ServeConfig, bool]] = []

    def serve(config: ServeConfig, *, demo: bool) -> int:
        calls.append((config, demo))
        return 0

    monkeypatch.setattr("mmserve.server.serve.serve", serve)
    return calls


def test_serve_has_safe_defaults(shell: Shell, served: list[tuple[ServeConfig, bool]]) -> None:
    assert shell("serve").code == 0
    assert served == [(ServeConfig(), False)]


def test_serve_options_win_over_the_file(
    shell: Shell, served: list[tuple[ServeConfig, bool]], tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: other\nport: 9000\nlimits: {max_images: 2}\n")
    options = ["--epd", "2,1,1", "--host", "0.0.0.0", "--api-key", "k", "--demo"]
    assert shell("serve", "mine", "--config", file, *options).code == 0
    ((config, demo),) = served
    assert demo
    assert (config.model, config.port, config.epd, config.host) == ("mine", 9000, (2, 1, 1), "0.0.0.0")
    assert config.api_key == ("k",)
    assert config.limits.max_images == 2


def test_serve_stops_at_a_wrong_file(
    shell: Shell, served: list[tuple[ServeConfig, bool]], tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("prot: 9000\n")
    run = shell("serve", "--config", file)
    assert run.code == 2
    assert "nearest is 'port'" in run.err
    assert not served


def test_doctor(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"missing": [{"what": "x", "do": "y", "required": False}]}
    monkeypatch.setattr("mmserve.doctor.report", lambda: found)
    monkeypatch.setattr("mmserve.doctor.render", lambda report: "all well")
    assert shell("doctor") == Run(0, "all well\n", "")
    run = shell("doctor", "--json")
    assert (run.code, json.loads(run.out)) == (0, found)
    found["missing"][0]["required"] = True
    assert shell("doctor").code == 1


def test_methods_lists_every_registry(shell: Shell) -> None:
    entries = json.loads(shell("methods", "--json").out)
    by_kind: dict[str, list[str]] = {}
    for entry in entries:
        by_kind.setdefault(entry["kind"], []).append(entry["name"])
        fields = {"kind", "name", "paper", "acts_at", "needs_query", "needs_whole_item"}
        assert entry.keys() >= fields | {"defaults", "families", "trained_weights"}
    assert by_kind["prune"][:4] == ["none", "random", "uniform", "holitom"]
    assert by_kind["attention"][0] == "dense"
    assert {"mminference", "a_shape"} <= set(by_kind["attention"])
    assert by_kind["kv"][:3] == ["none", "random", "snapkv"]
    assert by_kind["kv_dtype"] == ["auto", "bf16", "fp8", "int8", "int4"]
    holitom = next(entry for entry in entries if entry["name"] == "holitom")
    assert holitom["defaults"]["window_frames"] == 64
    text = shell("methods").out
    assert all(entry["name"] in text for entry in entries)
    assert text.startswith("kind ")
    (tau,) = [line for line in text.splitlines() if line.split()[1:3] == ["holitom", "tau"]]
    assert tau.split()[3] == "none"
    assert "none: 0.8, or 0.65 for keep of at most 0.1" in tau


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_check_config_fills_in_every_limit(shell: Shell, file: Path) -> None:
    run = shell("check-config", file)
    assert run.code == 0
    assert "max_total_pixels:" in run.out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("methods: {prune: holitm}\n", "holitom"),
        ("methods: {keep: 0.5}\n", "keep only with prune"),
        ("methods: {prune: holitom, prune_options: {tua: 1}}\n", "window_frames, tau"),
        ("methods: {prune: holitom+fastv, prune_options: {fastv.layer: 0}}\n", "layer to be a whole number"),
        ("methods: {kv: snapkv, kv_options: {window: 65}}\n", "window to be a whole number"),
        ("prune_under_load: {floor: 0.1}\n", "prune_under_load only with"),
        ("prot: 1\n", "port"),
        ("model: [", "YAML"),
        ("", ""),
    ],
)
def test_check_config_says_what_is_wrong(shell: Shell, tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    run = shell("check-config", file)
    assert run.code == (2 if text else 0)
    assert reason in run.err


def test_check_config_hides_keys(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("api_key: topsecret\n")
    run = shell("check-config", file)
    assert "topsecret" not in run.out + run.err
