"""What all tests share: Triton interprets its kernels, since no test machine has a GPU.

Triton decides that when it is first imported, which may be by a library, so it is said here, before any.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
