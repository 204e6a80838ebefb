"""What the demo shows: stages, tables and one progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_LINE_EVERY = 25


def say(text: str = "", style: str = "") -> None:
    """One line, wrapped by the terminal only."""
    Console().print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is left-aligned, the others are numbers."""
    table = Table(header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextlib.contextmanager
def stage(heading: str, seconds: dict[str, float], name: str) -> Iterator[None]:
    """Announces a stage, and at its end its duration, which goes into `seconds` as well."""
    say()
    say(heading, style="bold cyan")
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
    say(f"({seconds[name]:.0f} s)", style="dim")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Announces something that shows no progress, such as a compilation, and says how long it took."""
    begin = time.perf_counter()
    if sys.stdout.isatty():
        with Console().status(f"{what} ..."):
            yield
    else:
        yield
    say(f"{what}: {time.perf_counter() - begin:.1f} s")


class TrainingProgress:
    """Steps done, both losses, both speeds and the time left: a bar in a terminal, else a line each 25 steps."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps = steps
        self.first = done
        self.begin = time.perf_counter()
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
            )
            self.bar = Progress(*columns, console=Console(), expand=True)
            self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> TrainingProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, done: int, losses: Sequence[float], tokens_per_s: Sequence[float]) -> None:
        """losses, tokens_per_s: eager's and Infuse's."""
        if self.bar:
            values = (
                f"loss {losses[0]:.3f} | {losses[1]:.3f}  tok/s {_short(tokens_per_s[0])} | {_short(tokens_per_s[1])}"
            )
            self.bar.update(self.task, completed=done, description=values)
        elif done % PLAIN_LINE_EVERY == 0 or done == self.steps:
            left = (time.perf_counter() - self.begin) / max(1, done - self.first) * (self.steps - done)
            say(
                f"  step {done:>4}/{self.steps}  loss {losses[0]:.3f} eager, {losses[1]:.3f} Infuse"
                f"  tokens/s {_short(tokens_per_s[0])} eager, {_short(tokens_per_s[1])} Infuse  {left:.0f} s left"
            )


def _short(number: float) -> str:
    return f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
