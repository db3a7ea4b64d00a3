"""`mmserve serve`: what its options become."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mmserve.cli import app
from mmserve.config import ServeConfig
from mmserve.server import serve as serving
from mmserve.server.command import read_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("1.5 GB", 3 << 29),
        ("7k", 7 << 10),
    ],
)
def test_sizes_are_read_with_and_without_units(text: str, expected: int) -> None:
    assert read_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 apples", "1e9"])
def test_what_is_no_size_is_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="Expected a size such as"):
        read_bytes(text)


def test_options_win_over_the_file_and_leave_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ServeConfig] = []

    def run(config: ServeConfig, *, demo: bool) -> int:
        assert not demo
        seen.append(config)
        return 0

    monkeypatch.setattr(serving, "serve", run)
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9000\ncache:\n  kv_memory_bytes: 5\n  embedding_cache_bytes: 7\n")
    arguments = ["serve", "--config", str(file), "--kv-memory", "2GiB", "--max-num-batched-tokens", "64"]
    result = CliRunner().invoke(app, [*arguments, "--gpu-memory-utilization", "0.5"])
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.port, config.max_num_batched_tokens) == (9000, 64)
    cache = config.cache
    assert (cache.kv_memory_bytes, cache.embedding_cache_bytes) == (2 << 30, 7)
    assert cache.gpu_memory_utilization == 0.5
