"""Takes rights away from the calling process: memory, files, network, new processes. Linux only in full.

Knows nothing about media. Call it while the process has one thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

from mmserve.media.limits import MediaLimits

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CLONE_THREAD = 0x0001_0000

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL = 0x7FFF_0000, 0x0005_0000

# audit architecture, then numbers of: clone, clone3, and of the calls that are refused:
# sockets, exec, fork, ptrace and reading other processes, signals to others, kernel extensions
_CALLS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000_003E,
        56,
        435,
        (41, 42, 49, 50, 53, 57, 58, 59, 62, 101, 129, 165, 250, 272, 298, 308, 310, 311, 321, 322, 323, 425),
    ),
    "aarch64": (
        0xC000_00B7,
        220,
        435,
        (40, 97, 117, 129, 138, 198, 199, 200, 201, 203, 219, 221, 241, 268, 270, 271, 280, 281, 282, 425),
    ),
}


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the thread that started this process ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)  # the parent died before the call


def limit_resources(limits: MediaLimits) -> None:
    """What the process has mapped so far, its libraries, comes on top of its memory."""
    for kind, value in (
        (resource.RLIMIT_AS, _mapped_bytes() + limits.process_memory_bytes),
        (resource.RLIMIT_NOFILE, limits.process_open_files),
        (resource.RLIMIT_FSIZE, limits.max_decoded_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (ceiling, ceiling))


def _mapped_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def allow_cpu(seconds: int) -> None:
    """Let this process use that many more seconds of processor time, then be killed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def refuse_system_calls() -> bool:
    """No sockets, no other programs, no other processes from now on; False where the kernel cannot do it."""
    calls = _CALLS.get(platform.machine())
    if sys.platform != "linux" or calls is None:
        return False
    program = _filter(*calls)
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a count, then an aligned pointer
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    argument = ctypes.create_string_buffer(header, len(header))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0) == 0)


def _filter(architecture: int, clone: int, clone3: int, refused: tuple[int, ...]) -> bytes:
    """A seccomp program. Jumps count the instructions to skip."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    fail = step(_RETURN, _FAIL | errno.EPERM)
    steps = [
        step(_LOAD_WORD, 4),  # architecture
        step(_JUMP_EQUAL, architecture, if_true=1),
        fail,
        step(_LOAD_WORD, 0),  # number of the call
        step(_JUMP_AT_LEAST, 0x4000_0000, if_false=1),  # the x32 numbers
        fail,
        # clone3 keeps its flags in memory a filter cannot read: libc falls back to clone
        step(_JUMP_EQUAL, clone3, if_false=1),
        step(_RETURN, _FAIL | errno.ENOSYS),
    ]
    for number in refused:
        steps += [step(_JUMP_EQUAL, number, if_false=1), fail]
    steps += [
        step(_JUMP_EQUAL, clone, if_false=3),
        step(_LOAD_WORD, 16),  # flags: threads may start, processes may not
        step(_JUMP_ANY_BIT, _CLONE_THREAD, if_true=1),
        fail,
        step(_RETURN, _ALLOW),
    ]
    return b"".join(steps)
