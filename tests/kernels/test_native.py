"""Compiling and loading C: the cache, concurrent builds, and every way in which there is no library."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmserve.kernels import native

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MMSERVE_KERNELS", raising=False)
    native._load.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "sum"
    folder.mkdir()
    (folder / "cpu.h").write_text("enum { MORE = 1 };\n")
    (folder / "cpu.c").write_text('#include "cpu.h"\nint sum(int a, int b) { return a + b + MORE; }\n')
    return folder / "cpu.c"


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "mmserve" / "kernels").glob("*"))


@needs_compiler
def test_a_library_is_compiled_once_and_then_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native.load(source)
    assert library is not None
    assert library.sum(2, 3) == 6
    assert len(libraries(tmp_path)) == 1
    native._load.cache_clear()
    monkeypatch.setattr(native, "_compile", None)
    assert native.load(source) is not None


@needs_compiler
def test_a_changed_header_is_another_library(source: Path, tmp_path: Path) -> None:
    native.load(source)
    (source.parent / "cpu.h").write_text("enum { MORE = 2 };\n")
    native._load.cache_clear()
    library = native.load(source)
    assert library is not None
    assert library.sum(2, 3) == 7
    assert len(libraries(tmp_path)) == 2


@needs_compiler
def test_processes_that_compile_at_once_leave_one_whole_library(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mmserve.kernels import native; "
        "library = native.load(Path(sys.argv[1])); sys.exit(library is None or library.sum(2, 3) != 6)"
    )
    command = [sys.executable, "-c", code, str(source)]
    root = Path(__file__).parent.parent.parent
    processes = [subprocess.Popen(command, cwd=root) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(libraries(tmp_path)) == 1


@needs_compiler
def test_a_folder_that_others_can_write_is_not_trusted(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "mmserve" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    library = native.load(source)
    assert library is not None
    assert library.sum(2, 3) == 6
    assert libraries(tmp_path) == []


@needs_compiler
def test_code_that_does_not_compile_is_logged_once_and_leaves_nothing(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("int sum(int a, int b) { return a + ; }\n")
    with caplog.at_level(logging.INFO, native.logger.name):
        assert native.load(source) is None
        assert native.load(source) is None
    assert [record.getMessage() for record in caplog.records] == ["native kernel not available"]
    assert libraries(tmp_path) == []


def test_without_a_compiler_there_is_no_library(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO, native.logger.name):
        assert native.load(source) is None
    assert caplog.records[0].__dict__["reason"] == "no C compiler on the path"


def test_the_environment_turns_native_code_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSERVE_KERNELS", "naive")
    assert native.load(source) is None
