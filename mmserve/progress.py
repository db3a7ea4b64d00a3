"""A progress bar on stderr that stays out of the way of pipes and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(total: int, what: str, *, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Yields a function that advances the bar by one; any thread may call it. Hidden unless on a terminal."""
    console = Console(stderr=True) if shown else None
    if console is None or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
