"""A progress bar on stderr that stays out of the way of pipes and logs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_S = 30.0  # between two lines


@contextmanager
def progress_bar(
    total: int,
    what: str,
    *,
    shown: bool = True,
    plain: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[], None]]:
    """Yields a function that advances the bar by one; any thread may call it. Hidden unless on a terminal.

    Elsewhere, if `plain`, there is a line of text every `PLAIN_S`.
    """
    console = Console(stderr=True) if shown else None
    if console is None or not console.is_terminal:
        yield _PlainLines(total, what, console, clock).advance if console and plain else lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


class _PlainLines:
    """Counts, and tells now and then how far it is."""

    def __init__(self, total: int, what: str, console: Console, clock: Callable[[], float]) -> None:
        self._total, self._what, self._console, self._clock = total, what, console, clock
        self._lock = threading.Lock()
        self._done = 0
        self._due_at = clock() + PLAIN_S

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            if self._clock() < self._due_at:
                return
            self._due_at = self._clock() + PLAIN_S
            self._console.print(f"{self._what} {self._done}/{self._total}", highlight=False)
