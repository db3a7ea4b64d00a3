"""Compiles one C file with the system's compiler and loads it; None where that is impossible.

Libraries are kept in the user's cache, one per source, compiler and CPU. Plain C through ctypes, so that
it compiles in a second or two and needs no headers of others. Knows nothing about what the code computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

# -march=native comes first: with -dM it also tells what CPU the code will be for
FLAGS = (
    *("-march=native", "-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC"),
)
TIMEOUT_S = 120


class NoLibraryError(Exception):
    """Why there is no native code; never leaves this module."""


def load(source: Path) -> ctypes.CDLL | None:
    """The library of this C file, which may include headers beside it.

    None without a compiler, or when $MMSERVE_KERNELS is `naive`. Calls through it release the GIL. Where
    the compiler has no OpenMP the code runs on one thread.
    """
    if os.environ.get("MMSERVE_KERNELS") == "naive":
        return None
    return _load(source)


class Function(Protocol):
    """A C function; pointers are addresses or None."""

    def __call__(self, *arguments: float | None) -> int: ...


def function(
    source: Path, name: str, *, pointers: int, sizes: int, floats: int = 0, flags: int
) -> Function | None:
    """An int function of a C file that takes so many pointers, int64, float and int, in this order."""
    library = load(source)
    if library is None:
        return None
    found = library[name]
    found.argtypes = (
        [ctypes.c_void_p] * pointers
        + [ctypes.c_int64] * sizes
        + [ctypes.c_float] * floats
        + [ctypes.c_int] * flags
    )
    found.restype = ctypes.c_int
    return found


def load_all() -> None:
    """Compile every kernel now, so that no request waits for it."""
    for source in sorted(Path(__file__).parent.glob("*/cpu*.c")):
        load(source)


@cache
def _load(source: Path) -> ctypes.CDLL | None:
    try:
        return _built(source)
    except (NoLibraryError, OSError, subprocess.SubprocessError) as error:
        logger.info("native kernel not available", extra={"kernel": str(source), "reason": str(error)})
        return None


def _built(source: Path) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoLibraryError("no C compiler on the path")
    macros = _run([compiler, FLAGS[0], "-dM", "-E", "-x", "c", os.devnull])
    sources = [path.read_bytes() for path in sorted(source.parent.glob("*.[ch]"))]
    key = hashlib.sha256(b"\0".join([*sources, macros, " ".join(FLAGS).encode()])).hexdigest()
    folder = _cache_folder()
    if folder is None:
        # a loaded library needs its file no longer
        with tempfile.TemporaryDirectory(prefix="mmserve-kernels-") as private:
            library = Path(private) / "kernel.so"
            _compile(compiler, source, library)
            return ctypes.CDLL(str(library))
    library = folder / f"{source.parent.name}-{source.stem}-{key[:24]}.so"
    if not library.exists():
        _compile(compiler, source, library)
    return ctypes.CDLL(str(library))


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Appears whole or not at all: other processes may compile the same file."""
    descriptor, name = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
    os.close(descriptor)
    command = [compiler, *FLAGS, str(source), "-o", name, "-lm"]
    try:
        try:
            _run([*command, "-fopenmp"])
        except NoLibraryError:
            _run(command)
        Path(name).replace(library)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise NoLibraryError(done.stderr.decode(errors="replace").strip() or f"{command[0]} failed")
    return done.stdout


def _cache_folder() -> Path | None:
    """Where nobody else can put a library in our place; None when there is no such folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "mmserve" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError:
        return None
    is_private = state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder if is_private and os.access(folder, os.W_OK) else None
