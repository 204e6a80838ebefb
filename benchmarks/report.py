"""One case's rows as a table on the terminal: with rich where it is installed, plain otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from rows import Row

COLUMNS = (
    "impl",
    "median",
    "p20 .. p80",
    "% of limit",
    "max error",
    "peak",
    "saved",
    "compile",
    "vs best baseline",
    "note",
)


def is_infuse(impl: str) -> bool:
    return impl.startswith("infuse")


def best_baseline(rows: Sequence[Row]) -> Row | None:
    """The fastest row that isn't Infuse's."""
    return min((row for row in rows if not is_infuse(row.impl)), key=lambda row: row.median_ms, default=None)


def milliseconds(ms: float) -> str:
    """With the unit that fits: us below one millisecond."""
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:.2f} ms" if ms < 1000 else f"{ms / 1e3:.2f} s"


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells, one tuple a row, in the order of COLUMNS. Ratios above 1: faster than the best baseline."""
    baseline = best_baseline(rows)
    return [
        (
            row.impl,
            milliseconds(row.median_ms),
            f"{milliseconds(row.p20_ms)} .. {milliseconds(row.p80_ms)}",
            "" if row.percent_of_limit is None else f"{row.percent_of_limit:.1f}",
            "" if row.max_error is None else f"{row.max_error:.1e}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
            "" if row.saved_bytes is None else f"{row.saved_bytes / 2**20:.0f} MiB",
            "" if row.compile_s is None else f"{row.compile_s:.1f} s",
            "" if baseline is None else f"{baseline.median_ms / row.median_ms:.3f}x",
            row.note,
        )
        for row in rows
    ]


def print_case(rows: Sequence[Row]) -> None:
    """Prints one case's rows under its name; nothing when there are none."""
    if not rows:
        return
    cells = table(rows)
    try:
        console = importlib.import_module("rich.console").Console(width=170, soft_wrap=True)
        rich_table = importlib.import_module("rich.table").Table(*COLUMNS, box=None, padding=(0, 2, 0, 0))
    except ImportError:
        widths = [max(len(line[i]) for line in [COLUMNS, *cells]) for i in range(len(COLUMNS))]
        print(rows[0].case)
        for line in [COLUMNS, *cells]:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    for line in cells:
        rich_table.add_row(*line)
    console.print(rich_table)
