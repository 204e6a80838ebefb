"""What `infuse generate` says while nothing is written yet: bars in a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator


def speaks() -> bool:
    """Whether this process prints: of several that write one text together, the first."""
    return os.environ.get("RANK", "0") == "0"


def note(line: str) -> None:
    """One line of the error output."""
    if speaks():
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives the function that moves a bar on by so many bytes; at the end a line with the duration."""
    begin = time.perf_counter()
    if _has_bars():
        from rich.progress import DownloadColumn, TransferSpeedColumn

        with _bar(what, total, DownloadColumn(), TransferSpeedColumn()) as advance:
            yield advance
    else:
        yield lambda size: None
    note(f"{what}: {total / 1e9:.2f} GB in {time.perf_counter() - begin:.1f} s")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A moving bar with the time so far, for what shows no progress; at the end a line with the duration."""
    begin = time.perf_counter()
    if _has_bars():
        with _bar(what, None):
            yield
    else:
        yield
    note(f"{what}: {time.perf_counter() - begin:.1f} s")


@contextlib.contextmanager
def _bar(what: str, total: int | None, *columns: object) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    shown = (TextColumn(what, markup=False), BarColumn(), *columns, TimeElapsedColumn())
    with Progress(*shown, console=Console(stderr=True), transient=True) as progress:  # type: ignore[arg-type]
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)


def _has_bars() -> bool:
    return speaks() and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
