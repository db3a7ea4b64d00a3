"""The page of methods: every registered one is on it, and figures are those of the reports."""

from __future__ import annotations

import json
from pathlib import Path

from typer import Typer
from typer.testing import CliRunner

from mmserve import catalogue
from mmserve.bench.pairing import Metric, row
from mmserve.evaluation import methods_doc, report
from mmserve.evaluation.report import Geometry, Outcome
from mmserve.request import Methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
MACHINE = {"machine": {"cpu": "Some CPU", "cores": 2, "torch": "2"}, "commit": "abcdef0123456789"}


def listed(page: str) -> set[str]:
    """The first word in backquotes of every row of a table."""
    return {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}


def test_every_method_is_on_the_page() -> None:
    assert listed(methods_doc.document([], [])) == {entry["name"] for entry in catalogue.describe()}


def test_the_page_in_the_repository_is_of_this_version() -> None:
    lists = methods_doc.document([], [])
    assert PAGE.read_text(encoding="utf-8").startswith(lists), "run mmserve.evaluation.methods_doc again"


def test_figures_come_from_the_reports(tmp_path: Path) -> None:
    geometry = Geometry(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, head_dim=8)
    outcomes = [Outcome(question_id="q", kind="a", clip="c", correct=True)]
    methods = Methods(prune="holitom", keep=0.1)
    evaluated = MACHINE | {"rows": [report.row("clipworld-basic", methods, outcomes, outcomes, geometry)]}
    timed = row(Metric(name="ttft_warm", unit="ms", gate=2.0), [1.0], [3.0])
    bench = MACHINE | {
        "settings": {"methods": {"prune": "holitom", "keep": 0.1, "attention": "dense"}},
        "rows": [timed],
    }
    for name, found in (("e.json", evaluated), ("b.json", bench)):
        (tmp_path / name).write_text(json.dumps(found))
    app = Typer()
    app.command()(methods_doc.write)
    files = ["--eval", str(tmp_path / "e.json"), "--bench", str(tmp_path / "b.json")]
    done = CliRunner().invoke(app, [*files, "-o", str(tmp_path / "page.md")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.md").read_text()
    assert "| clipworld-basic | holitom | 0.1 |" in page
    assert "## Speed of prune holitom, keep 0.1" in page
    assert "| ttft_warm | 1 ms | 3 ms | 3 | 2 passed | 1 |" in page
    assert "Some CPU, 2 cores, torch 2, commit abcdef012345." in page
