"""What all tests share: Triton interprets its kernels, since no test machine has a GPU; interrupts arrive;
logging stays as it was.

Triton decides that when it is first imported, which may be by a library, so it is said here, before any.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "1"

# a shell starts its background jobs with interrupts ignored, and children inherit that: tests send them
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets logging up for itself."""
    logger = logging.getLogger("mmserve")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
