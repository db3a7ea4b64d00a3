"""The GPU bench as far as a CPU shows it: every part end to end on small sizes, its checks and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmserve.bench.gpu import command, dense, engine, measure
from mmserve.bench.gpu.grid import Choice, Grid, index_of, pairs_of
from mmserve.bench.gpu.measure import Session
from mmserve.bench.gpu.peers import causal_blocks
from mmserve.bench.pairing import Metric
from mmserve.errors import MMServeError
from mmserve.kernels.prefill_attention.index import check_index, tile_keys, tile_rows_of

# autouse: the interpreter rounds to fp8 in a way of its own
from tests.kernels.test_kv_codec import _rounded_fp8  # noqa: F401

ROOT = Path(__file__).parents[2]
CODECS = ("int8_slot", "int4_channel", "int4_slot", "fp8_slot")


def make_session(*, is_smoke: bool = True) -> Session:
    return Session(device=torch.device("cpu"), rounds=2, is_smoke=is_smoke, tell=lambda line: None)


@pytest.mark.parametrize(
    ("part", "metrics"),
    [
        ("dense", ["dense_48_vs_math", "dense_144_vs_math"]),
        (
            "sparse",
            [f"sparse_{length}_{what}" for length in (48, 96) for what in ("index", "vs_dense", "vs_math")]
            + ["sparse_24_end_to_end"],
        ),
        (
            "decode",
            ["decode_3x64_vs_bandwidth", "decode_3x64_vs_math"] + [f"decode_3x64_{name}" for name in CODECS],
        ),
        (
            "codec",
            [
                f"codec_{name}{turned}_{what}_vs_bandwidth"
                for name in CODECS
                for turned in ("", "_hadamard")
                for what in ("store", "load")
            ],
        ),
        (
            "engine",
            ["nano_prefill_8"]
            + [f"nano_decode_{batch}{kind}" for batch in (1, 3) for kind in ("", "_vs_bandwidth")],
        ),
    ],
)
def test_every_part_runs_in_the_interpreter_from_checks_to_rows(
    part: str,
    metrics: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MMSERVE_KERNELS", "interpret")
    file = tmp_path / "report.json"
    assert command.main(["--part", part, "--rounds", "1", "--smoke", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["bench"], report["settings"]["part"], report["missing"]) == ("gpu", part, [])
    assert [row["metric"] for row in report["rows"]] == metrics
    for row in report["rows"]:
        compared = () if row["metric"].endswith("_index") else (row["peer"], row["ratio"])
        assert all(value > 0 for value in (row["ours"], *compared))
        assert row["runs"] == 1
        assert "gate" not in row
    assert report["checks"]
    assert all(check["max_difference"] <= check["tolerance"] for check in report["checks"])
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


def test_what_was_measured_is_reported_whatever_a_part_dies_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(session: Session) -> None:
        session.add(Metric(name="m", unit="ms"), [1.0], None)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(command, "PARTS", {"dense": dies})
    assert command.main(["--part", "all", "--smoke", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert [row["metric"] for row in json.loads(out)["rows"]] == ["m"]
    assert "bench.gpu: dense failed" in err
    assert "OutOfMemoryError" in err


def test_a_part_out_of_time_measures_one_round_and_starts_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make_session()
    assert session.has_time("x", 1e9)
    monkeypatch.setattr(measure, "PART_S", 0.0)
    session.start_part()
    assert len(session.times("x", {"ours": lambda: None})["ours"]) == 1
    assert not session.has_time("x")
    assert session.missing == ["x: no time left"]
    monkeypatch.setattr(measure, "PART_S", 3600.0)
    session.start_part()
    assert session.has_time("x")
    assert not session.has_time("x", 4000.0)
    assert len(session.times("x", {"ours": lambda: None}, within_s=0.0)["ours"]) == 1


@pytest.mark.parametrize("length", [3, 60, 151])
def test_the_index_of_a_grid_is_the_pattern(length: int) -> None:
    grid = Grid(strides=(2, 3, 5), sink=4, local=6, tail=5, tile_rows=8)
    heads = [(3, 0, True), (5, 4, True), (2, 1, True), (5, 1, False)]
    stride, first, is_grid = zip(*heads, strict=True)
    choice = Choice(torch.tensor(stride).int(), torch.tensor(first).int(), torch.tensor(is_grid))
    index = index_of(choice, length, 2, grid)
    check_index(index, torch.full((1, 2), length), q_heads=4)
    seen = torch.zeros(4, length, length, dtype=torch.int64)
    for tile in index.tiles.tolist():
        seen[tile[1], tile_rows_of(index, tile)[:, None], tile_keys(index, tile)] += 1
    assert pairs_of(index) == seen.sum()
    row, key = torch.arange(length)[:, None], torch.arange(length)
    for found, (stride_of, first_of, takes_grid) in zip(seen, heads, strict=True):
        everything = (row % stride_of == first_of) | (row >= length - grid.tail) | (not takes_grid)
        needed = (key < grid.sink) | (key % stride_of == first_of) | (key > row - grid.local)
        causal = key <= row
        assert found[(needed | everything) & causal].eq(1).all()
        # the band of a tile is that of its first row
        spanned = grid.local + 2 * grid.tile_rows
        assert found[~needed & ~everything & (key < row - spanned)].eq(0).all()
    costs = [len(tile_keys(index, tile)) for tile in index.tiles.tolist() if tile[3]]
    assert costs == sorted(costs, reverse=True), "longest first"


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
    scaled = Metric(name="n", unit="ms", gate=3.0, goal=4.0)
    session.add(scaled, [1.5], [6.0], scaled_from="4 of 28 layers", recall=0.97)
    session.add(Metric(name="o", unit="ms"), [1.5], None)
    assert command.markdown(session.rows).splitlines()[2:] == [
        "| m | 300 TFLOP/s | 330 | 0.9091 | 0.75 passed | 1 | - |",
        "| m | 200 TFLOP/s | 330 | 0.6061 | 0.75 missed | 1 | - |",
        "| n | 1.5 ms | 6 | 4 | 3 passed (goal 4) | 1 | scaled from 4 of 28 layers; recall 0.97 |",
        "| o | 1.5 ms | - | - | - | 1 | - |",
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
        "sys.exit(command.main(['--part', 'all', '--smoke', '--rounds', '1', '--json', '-']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]
