"""What all tests share: Triton interprets its kernels, since no test machine has a GPU; interrupts arrive.

Triton decides that when it is first imported, which may be by a library, so it is said here, before any.
"""

from __future__ import annotations

import os
import signal

os.environ["TRITON_INTERPRET"] = "1"

# a shell starts its background jobs with interrupts ignored, and children inherit that: tests send them
signal.signal(signal.SIGINT, signal.default_int_handler)
