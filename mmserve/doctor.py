"""What this machine has and what it lacks: versions, processor, memory, devices, the embedded model.

Works, and says so, when any package is absent or broken. Knows nothing about running servers.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from mmserve.cores import usable_cores

# distribution -> what it is for
REQUIRED = {
    "torch": "models",
    "transformers": "vision towers and configurations",
    "tokenizers": "text",
    "safetensors": "weights",
    "numpy": "everything",
    "av": "video and images",
    "pillow": "images",
    "pyzmq": "messages between processes",
    "msgspec": "messages between processes",
    "fastapi": "the HTTP server",
    "uvicorn": "the HTTP server",
    "httpx": "fetching media",
    "lmdb": "embeddings kept on disk",
}
# distribution -> what it is for, and the extra that brings it ("" when the base install does)
OPTIONAL = {
    "triton": ("GPU kernels", ""),
    "decord2": ("the second video decoder", ""),
    "torchcodec": ("the third video decoder", "torchcodec"),
    "gradio": ("the demo page", "demo"),
    "ray": ("several machines", "cluster"),
    "redis": ("embeddings shared between servers", "redis"),
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
MIN_PYTHON = (3, 11)
MIN_FFMPEG = (8, 1, 2)
MIN_SHM_BYTES = 256 << 20
SHM = "/dev/shm"  # noqa: S108  # only its size is read
TINY = Path(__file__).parent / "assets" / "tiny"
TINY_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def report() -> dict[str, Any]:
    """Everything as plain JSON data; `missing` names each lack, whether it is required, and the remedy."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in [*REQUIRED, *OPTIONAL]},
        "video": _video(),
        "cpu": _cpu(),
        "memory": _memory(),
        "cuda": _cuda(),
        "shm": _shm(),
        "tiny": all((TINY / name).is_file() for name in TINY_FILES),
    }
    found["missing"] = _missing(found)
    return found


def render(found: dict[str, Any]) -> str:
    """A report as text for a terminal."""
    rows = [("python", found["python"]), ("platform", found["platform"])]
    rows += [(name, version or "absent") for name, version in found["packages"].items()]
    video = found["video"]
    rows += [("ffmpeg", video["ffmpeg"] or "unknown")]
    rows += [(f"  {name}", version) for name, version in video["libraries"].items()]
    cpu, memory, cuda, shm = found["cpu"], found["memory"], found["cuda"], found["shm"]
    rows += [("cpu", f"{cpu['model']}, {cpu['cores']} cores"), ("  flags", " ".join(cpu["flags"]) or "none")]
    rows += [("memory", f"{_size(memory['available_bytes'])} of {_size(memory['total_bytes'])} available")]
    rows += [("cuda build", cuda["build"] or "none")]
    rows += [
        ("  device", f"{d['name']}, {d['capability']}, {_size(d['memory_bytes'])}") for d in cuda["devices"]
    ]
    rows += [(SHM, f"{_size(shm['free_bytes'])} of {_size(shm['total_bytes'])} free")]
    rows += [("embedded model", "present" if found["tiny"] else "absent")]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines.append("")
    if not found["missing"]:
        lines.append("Nothing is missing.")
    for lack in found["missing"]:
        lines.append(f"{'MISSING' if lack['required'] else 'optional'}: {lack['what']}. {lack['do']}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _load(module: str) -> tuple[Any, str | None]:
    """The module, or why it does not load; a shared library that is absent counts as well."""
    try:
        return import_module(module), None
    except Exception as error:  # whatever is wrong with it, the report goes on
        return None, f"{type(error).__name__}: {error}"


def _video() -> dict[str, Any]:
    av, error = _load("av")
    versions: dict[str, tuple[int, ...]] = getattr(av, "library_versions", {})
    return {
        "ffmpeg": getattr(av, "ffmpeg_version_info", None),
        "libraries": {name: ".".join(map(str, version)) for name, version in sorted(versions.items())},
        "av_error": error,
        "decord_error": _load("decord")[1],
        # the unmaintained package of the same module name, with FFmpeg 4.1.6 inside
        "old_decord": _version("decord"),
    }


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    cores = usable_cores()
    return {
        "model": model[1] if model else platform.machine(),
        "cores": cores,
        "flags": [flag for flag in CPU_FLAGS if flag in known],
    }


def _memory() -> dict[str, int | None]:
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))

    def size_bytes(name: str) -> int | None:
        return int(sizes[name]) * 1024 if name in sizes else None

    return {"total_bytes": size_bytes("MemTotal"), "available_bytes": size_bytes("MemAvailable")}


def _cuda() -> dict[str, Any]:
    torch, error = _load("torch")
    found: dict[str, Any] = {"build": None, "devices": [], "error": error}
    if torch is None:
        return found
    try:
        found["build"] = torch.version.cuda
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"sm_{device.major}{device.minor}"
            entry = {"name": device.name, "capability": capability, "memory_bytes": device.total_memory}
            found["devices"].append(entry)
    except Exception as broken:  # a driver that does not fit, a stub of torch
        found["error"] = f"{type(broken).__name__}: {broken}"
    return found


def _shm() -> dict[str, int | None]:
    try:
        usage = shutil.disk_usage(SHM)
    except OSError:
        return {"total_bytes": None, "free_bytes": None}
    return {"total_bytes": usage.total, "free_bytes": usage.free}


def _missing(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [*_missing_packages(found["packages"]), *_broken_packages(found), *_missing_resources(found)]


def _lack(what: str, do: str, *, required: bool) -> dict[str, Any]:
    return {"what": what, "do": do, "required": required}


def _missing_packages(versions: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    for name, purpose in REQUIRED.items():
        if versions[name] is None:
            yield _lack(f"{name} ({purpose})", f"Run: pip install {name}", required=True)
    for name, (purpose, extra) in OPTIONAL.items():
        if versions[name] is None:
            do = f"pip install 'mmserve[{extra}]'" if extra else f"pip install {name}"
            yield _lack(f"{name} ({purpose})", f"Run: {do}", required=False)


def _broken_packages(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    video = found["video"]
    errors = {"torch": found["cuda"]["error"], "av": video["av_error"], "decord2": video["decord_error"]}
    for name, error in errors.items():
        if found["packages"][name] is not None and error is not None:
            do = f"Run: pip install --force-reinstall {name}"
            yield _lack(f"a working {name} ({error})", do, required=name in REQUIRED)
    if video["old_decord"] is not None:
        do = "Run: pip uninstall decord, then: pip install --force-reinstall decord2"
        yield _lack(
            f"a maintained decord (found {video['old_decord']}, with an old FFmpeg)", do, required=True
        )
    numbers = tuple(map(int, re.findall(r"\d+", video["ffmpeg"] or "")[:3]))
    if numbers and numbers < MIN_FFMPEG:
        wanted = ".".join(map(str, MIN_FFMPEG))
        what = f"FFmpeg {wanted} in av (found {video['ffmpeg']})"
        yield _lack(what, "Run: pip install --upgrade av", required=True)


def _missing_resources(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if tuple(map(int, re.findall(r"\d+", found["python"])[:2])) < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        yield _lack(f"Python {wanted}", "Make the environment with a newer Python.", required=True)
    if not found["tiny"]:
        do = "Reinstall mmserve, or name another model with --model."
        yield _lack("the embedded model", do, required=True)
    free_bytes = found["shm"]["free_bytes"]
    if free_bytes is None or free_bytes < MIN_SHM_BYTES:
        what = f"{_size(MIN_SHM_BYTES)} free in {SHM} (found {_size(free_bytes)})"
        do = "Stages then exchange tensors through ordinary files; in a container raise --shm-size."
        yield _lack(what, do, required=False)


def _size(count_bytes: int | None) -> str:
    if count_bytes is None:
        return "unknown"
    return f"{count_bytes / 2**30:.1f} GiB" if count_bytes >= 2**30 else f"{count_bytes / 2**20:.0f} MiB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
