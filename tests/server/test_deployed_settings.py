"""Settings of a deployment's methods are checked before anything is started, in a process with torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmserve import cli
from mmserve.catalogue import check_methods, num_layers
from mmserve.config import MethodDefaults
from mmserve.errors import BadRequest, ConfigError
from mmserve.models.resolve import resolve
from mmserve.request import Methods
from mmserve.server import serve
from mmserve.server.schema import ChatRequest, methods_of
from mmserve.server.serve import check_settings

DEEP = Methods(prune="holitom+fastv", keep=0.5, prune_options={"fastv.layer": 77})


def test_a_model_says_how_many_layers_it_has(tmp_path: Path) -> None:
    assert (num_layers(resolve("tiny")) or 0) > 1
    assert num_layers(tmp_path) is None
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    assert num_layers(tmp_path) == 3


def test_a_layer_behind_the_model_is_refused() -> None:
    check_methods(DEEP)
    check_methods(DEEP, 78)
    with pytest.raises(BadRequest, match="Expected a layer below 4 with prune fastv"):
        check_methods(DEEP, 4)


def test_what_does_not_fit_is_told_by_another_process() -> None:
    with pytest.raises(ConfigError, match=r"Expected a layer below .* with prune fastv.*but got 77"):
        check_settings(DEEP, resolve("tiny"))


def test_where_nothing_is_set_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "subprocess", None)
    check_settings(Methods(prune="holitom", keep=0.5), resolve("tiny"))


def test_serve_ends_at_once_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("methods: {prune: holitom, prune_options: {tua: 1}}\n")
    monkeypatch.setattr(sys, "argv", ["mmserve", "serve", "--config", str(file), "--port", "0"])
    assert cli.main() == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "Expected settings of holitom to be one of" in told


@pytest.mark.parametrize(
    ("field", "name"),
    [("prune_options", "weights"), ("prune_options", "dynamic_llava.weights"), ("kv_options", "weights")],
)
def test_a_client_cannot_name_a_file(field: str, name: str) -> None:
    body = ChatRequest.model_validate({"messages": [], "mmserve": {field: {name: "/etc/passwd"}}})
    with pytest.raises(BadRequest, match="only the deployment can name a file"):
        methods_of(body, MethodDefaults())
