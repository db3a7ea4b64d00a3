"""The GPU bench as far as a CPU shows it: every part end to end on small sizes, its checks and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmserve.bench.gpu import command, dense, engine
from mmserve.bench.gpu.measure import Session
from mmserve.bench.gpu.peers import causal_blocks
from mmserve.bench.pairing import Metric
from mmserve.errors import MMServeError

ROOT = Path(__file__).parents[2]


def make_session(*, is_smoke: bool = True) -> Session:
    return Session(device=torch.device("cpu"), rounds=2, is_smoke=is_smoke, tell=lambda line: None)


@pytest.mark.parametrize(
    ("part", "metrics"),
    [
        ("dense", ["dense_64_vs_math", "dense_256_vs_math"]),
        ("decode", ["decode_3x64_vs_bandwidth", "decode_3x64_vs_math"]),
        (
            "engine",
            ["nano_prefill_40"]
            + [f"nano_decode_{batch}{kind}" for batch in (1, 16) for kind in ("", "_vs_bandwidth")],
        ),
    ],
)
def test_every_part_runs_from_checks_to_rows(
    part: str, metrics: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    assert command.main(["--part", part, "--rounds", "2", "--smoke", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["bench"], report["settings"]["part"], report["missing"]) == ("gpu", part, [])
    assert [row["metric"] for row in report["rows"]] == metrics
    for row in report["rows"]:
        assert min(row["ours"], row["peer"], row["ratio"]) > 0
        assert row["runs"] == 2
        assert "gate" not in row
    assert report["checks"]
    assert all(check["max_abs_difference"] <= check["tolerance"] for check in report["checks"])
    out = capsys.readouterr().out
    assert out.startswith("| metric | ours | peer |")
    assert out.count("\n") == 2 + len(metrics)


def test_json_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--part", "dense", "--rounds", "1", "--smoke", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--part", "dense"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "bench.gpu: Expected a CUDA device, but there is none\n"


def test_other_numbers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dense, "TOLERANCE", -1.0)
    assert command.main(["--part", "dense", "--smoke", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == []
    assert "no speed is reported" in err
    session = make_session()
    with pytest.raises(MMServeError):
        session.check("nan", torch.tensor([torch.nan]), torch.zeros(1), 1.0)


def test_a_peer_that_cannot_run_is_missing_but_we_must() -> None:
    def fails() -> None:
        raise RuntimeError("No available kernel.\nMore")

    session = make_session()
    taken = session.times("x", {"ours": lambda: None, "cudnn": fails})
    assert list(taken) == ["ours"]
    assert session.missing == ["x: cudnn: No available kernel."]
    with pytest.raises(RuntimeError):
        session.times("x", {"ours": fails})


def test_a_gate_shows_in_the_table() -> None:
    session = make_session(is_smoke=False)
    metric = Metric(name="m", unit="TFLOP/s", more_is_better=True, gate=0.75)
    session.add(metric, [300.0], [330.0])
    session.add(metric, [200.0], [330.0])
    session.add(Metric(name="n", unit="ms"), [1.5], None)
    assert command.markdown(session.rows).splitlines()[2:] == [
        "| m | 300 TFLOP/s | 330 | 0.9091 | 0.75 passed | 1 |",
        "| m | 200 TFLOP/s | 330 | 0.6061 | 0.75 missed | 1 |",
        "| n | 1.5 ms | - | - | - | 1 |",
    ]


def test_blocks_of_a_causal_mask_are_those_that_torch_makes() -> None:
    made = causal_blocks(512, torch.device("cpu"))
    rows, keys = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    whole = (rows >= keys).view(4, 128, 4, 128).transpose(1, 2)
    some, every = whole.flatten(2).any(-1), whole.flatten(2).all(-1)
    assert made.full_kv_num_blocks is not None
    assert made.full_kv_indices is not None
    for row in range(4):
        diagonal = made.kv_indices[0, 0, row, : made.kv_num_blocks[0, 0, row]].tolist()
        full = made.full_kv_indices[0, 0, row, : made.full_kv_num_blocks[0, 0, row]].tolist()
        assert full == every[row].nonzero().flatten().tolist()
        assert diagonal == (some[row] & ~every[row]).nonzero().flatten().tolist()


def test_the_real_sizes_are_those_of_the_models() -> None:
    large, small = engine.text_config("ov-7b"), engine.text_config("ov-0.5b")
    assert (large.heads, large.kv_heads, large.head_dim, large.tied) == (28, 4, 128, False)
    assert (small.heads, small.kv_heads, small.head_dim, small.tied) == (14, 2, 64, True)


def test_it_needs_no_library_of_a_server() -> None:
    code = (
        "import sys\n"
        "absent = {'zmq', 'fastapi', 'av', 'msgspec', 'typer', 'rich', 'PIL', 'httpx', 'decord'}\n"
        "sys.modules.update(dict.fromkeys(absent))\n"  # importing one of them fails
        "from mmserve.bench.gpu import command\n"
        "sys.exit(command.main(['--part', 'decode', '--smoke', '--rounds', '1', '--json', '-']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]
