"""The doctor: a report on this machine, and on machines where everything is absent or broken."""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmserve import doctor


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with every package, whose modules are cheap stand-ins."""
    for name in doctor.TINY_FILES:
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "TINY", tmp_path)
    versions = dict.fromkeys([*doctor.REQUIRED, *doctor.OPTIONAL], "1.0")

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    av = SimpleNamespace(library_versions={"libavcodec": (62, 28, 102)}, ffmpeg_version_info="n8.1.2-3-gabc")
    gpu = SimpleNamespace(name="Test GPU", major=9, minor=0, total_memory=139 << 30)
    cuda = SimpleNamespace(device_count=lambda: 1, get_device_properties=lambda _: gpu)
    torch = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=cuda)
    for name, module in (("av", av), ("decord", SimpleNamespace()), ("torch", torch)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(doctor, "_shm", lambda: {"total_bytes": 8 << 30, "free_bytes": 4 << 30})
    return tmp_path


def _lacks(found: dict[str, Any]) -> dict[str, bool]:
    return {lack["what"]: lack["required"] for lack in found["missing"]}


def test_a_sound_machine_misses_nothing(sound: Path) -> None:
    found = doctor.report()
    assert found["missing"] == []
    assert found["cuda"]["devices"] == [
        {"name": "Test GPU", "capability": "sm_90", "memory_bytes": 139 << 30}
    ]
    assert found["video"]["libraries"] == {"libavcodec": "62.28.102"}
    text = doctor.render(found)
    assert "Test GPU, sm_90, 139.0 GiB" in text
    assert text.endswith("Nothing is missing.")


def test_this_machine_gets_a_report_that_is_plain_json() -> None:
    found = doctor.report()
    assert json.loads(json.dumps(found)) == found
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert found["packages"]["torch"].startswith(metadata.version("torch"))
    assert found["cpu"]["cores"] >= 1
    assert found["video"]["ffmpeg"] is not None
    assert doctor.render(found)


def test_nothing_installed_still_gives_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    def load(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("mmserve.doctor.import_module", load)
    monkeypatch.setattr(doctor, "TINY", tmp_path / "absent")
    monkeypatch.setattr(doctor, "_read", lambda _: "")
    monkeypatch.setattr(doctor, "_shm", lambda: {"total_bytes": None, "free_bytes": None})
    found = doctor.report()
    named = " ".join(_lacks(found))
    for name in [*doctor.REQUIRED, *doctor.OPTIONAL, "embedded model", "/dev/shm"]:
        assert name in named
    assert all(lack["do"] for lack in found["missing"])
    assert sum(_lacks(found).values()) == len(doctor.REQUIRED) + 1
    assert "MISSING: torch (models). Run: pip install torch" in doctor.render(found)


@pytest.mark.parametrize("name", [*doctor.REQUIRED, *doctor.OPTIONAL])
def test_one_absent_package_is_named_with_its_remedy(
    sound: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    present = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: None if asked == name else present(asked))
    (lack,) = doctor.report()["missing"]
    assert lack["what"].startswith(name)
    assert lack["required"] is (name in doctor.REQUIRED)
    assert "pip install" in lack["do"]


@pytest.mark.parametrize("error", [OSError("libcudart.so.13: cannot open"), ImportError("bad ABI")])
@pytest.mark.parametrize("name", ["torch", "av", "decord"])
def test_a_package_that_does_not_load_is_broken_not_absent(
    sound: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def import_module(asked: str) -> object:
        if asked == name:
            raise error
        return importlib.import_module(asked)

    monkeypatch.setattr("mmserve.doctor.import_module", import_module)
    (lack,) = doctor.report()["missing"]
    assert lack["what"].startswith(f"a working {name}")
    assert str(error) in lack["what"]


def test_a_driver_that_raises_is_reported(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device_count() -> int:
        raise RuntimeError("driver too old")

    torch = SimpleNamespace(
        version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(device_count=device_count)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = doctor.report()
    assert found["cuda"]["build"] == "13.0"
    assert _lacks(found) == {"a working torch (RuntimeError: driver too old)": True}


@pytest.mark.parametrize(
    ("version", "old"), [("8.1.1", True), ("n7.1", True), ("8.1.2", False), ("N-1", True)]
)
def test_an_old_ffmpeg_is_named(
    sound: Path, monkeypatch: pytest.MonkeyPatch, version: str, old: bool
) -> None:
    av = SimpleNamespace(library_versions={}, ffmpeg_version_info=version)
    monkeypatch.setitem(sys.modules, "av", av)
    assert bool(doctor.report()["missing"]) is old


def test_the_unmaintained_decord_is_named(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: "0.6.0" if asked == "decord" else present(asked))
    (lack,) = doctor.report()["missing"]
    assert "0.6.0" in lack["what"]
    assert lack["required"]


def test_an_incomplete_embedded_model_is_missing(sound: Path) -> None:
    (sound / "model.safetensors").unlink()
    assert _lacks(doctor.report()) == {"the embedded model": True}


def test_little_shared_memory_is_no_error(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_shm", lambda: {"total_bytes": 64 << 20, "free_bytes": 64 << 20})
    assert _lacks(doctor.report()) == {"256 MiB free in /dev/shm (found 64 MiB)": False}


def test_cpu_flags_come_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model name\t: Some CPU\nflags\t\t: sse avx2 amx_tile avx512_bf16\n"
    monkeypatch.setattr(doctor, "_read", lambda _: text)
    found = doctor._cpu()
    assert found["model"] == "Some CPU"
    assert found["flags"] == ["avx2", "avx512_bf16", "amx_tile"]
