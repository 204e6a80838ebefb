"""The README's tables of results, made from benchmarks/results: between markers, and nowhere typed by hand.

    python benchmarks/tables.py [--check] [--readme FILE] [--results DIR]

A marker `<!-- results:norms -->` and the next `<!-- /results -->` enclose the table of that benchmark; what stands
between them is replaced. `<!-- support -->` likewise holds the table of support. For each device and case the newest
run is taken that has both Infuse and something to compare it with.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from report import is_infuse, milliseconds
from rows import RESULTS, Row, load

README = Path(__file__).resolve().parent.parent / "README.md"
# Measured for the kernels' sake: not what torch.compile with Infuse gives a user. How such names begin.
NOT_FOR_USERS = "infuse-kernel"
# Whose tables show the memory that a call takes beyond its inputs, too.
ABOUT_MEMORY = ("linear_cross_entropy",)
# Cases that a benchmark had once and that larger ones replace.
RETIRED = {"models": re.compile(r"llama-8b 2 layers")}
_BLOCK = re.compile(r"(<!-- results:(?P<benchmark>\w+) -->\n)(?P<body>.*?)(<!-- /results -->)", re.DOTALL)
_SUPPORT = re.compile(r"(<!-- support -->\n).*?(<!-- /support -->)", re.DOTALL)


def update(readme_text: str, results_root: Path) -> str:
    """The README's text with every marked block made anew. A block with no results says so."""

    def fill(match: re.Match[str]) -> str:
        return match.group(1) + tables(match.group("benchmark"), results_root) + match.group(4)

    def fill_support(match: re.Match[str]) -> str:
        from support import table

        return match.group(1) + table() + match.group(2)

    return _SUPPORT.sub(fill_support, _BLOCK.sub(fill, readme_text))


def tables(benchmark: str, results_root: Path) -> str:
    """One Markdown table for each device that has results of this benchmark."""
    files = sorted(results_root.glob(f"*/{benchmark}.jsonl"))
    if benchmark == "coverage" and files:
        return "\n".join(coverage_table(path) for path in files)
    parts = [part for part in (device_table(benchmark, load(path)) for path in files) if part]
    return "\n".join(parts) if parts else f"No results yet: `python benchmarks/{benchmark}.py` makes them.\n"


def coverage_table(path: Path) -> str:
    """Sites of the zoo that were fused, by configuration and kind: the newest run of each configuration."""
    import coverage_rows

    rows = coverage_rows.load(path)
    newest = {row.configuration: row for row in rows}.values()
    torches, commits = (list(dict.fromkeys(getattr(row, name) for row in newest)) for name in ("torch", "commit"))
    caption = (
        f"torch {', '.join(torches)}, commit {', '.join(commits)}, `python benchmarks/coverage.py`; "
        "fused of all in graphs."
    )
    return f"{caption}\n\n{coverage_rows.table(rows)}"


def device_table(benchmark: str, rows: Sequence[Row]) -> str:
    """The best of Infuse against the best of the others, case by case; "" when no run has both."""
    retired = RETIRED.get(benchmark)
    cases = [case for case in dict.fromkeys(row.case for row in rows) if not (retired and retired.search(case))]
    pairs = [pair for case in cases if (pair := newest_pair([row for row in rows if row.case == case])) is not None]
    if not pairs:
        return ""
    used = [row for pair in pairs for row in pair]
    beside = [
        (title, cell)
        for title, name, cell in BESIDE
        if any(getattr(row, name) is not None for row in used) and (name != "peak_bytes" or benchmark in ABOUT_MEMORY)
    ]
    lines = [line(*pair, [cell for _, cell in beside]) for pair in pairs]
    torches, commits = (sorted({getattr(row, name) for row in used}) for name in ("torch", "commit"))
    caption = (
        f"`{used[-1].gpu}`, torch {', '.join(torches)}, commit {', '.join(commits)}, "
        f"`python benchmarks/{benchmark}.py`; above 1x Infuse is faster."
    )
    head = "| case | best without Infuse | | best with Infuse | | ratio | of the limit |"
    head += "".join(f" {title} without | with |" for title, _ in beside)
    rule = "|---|---|---:|---|---:|---:|---:|" + "---:|---:|" * len(beside)
    return "\n".join([caption, "", head, rule, *lines, ""])


def newest_pair(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """(best other, best Infuse) of one case, from the last run in the file that has both."""
    for run_id in reversed(list(dict.fromkeys(row.run_id for row in rows))):
        run = [row for row in rows if row.run_id == run_id and not row.impl.startswith(NOT_FOR_USERS)]
        ours = [row for row in run if is_infuse(row.impl)]
        others = [row for row in run if not is_infuse(row.impl)]
        if ours and others:
            return min(others, key=lambda row: row.median_ms), min(ours, key=lambda row: row.median_ms)
    return None


def line(other: Row, ours: Row, beside: Sequence[Callable[[Row], str]] = ()) -> str:
    """One row. beside: what is told of each of the two after the times."""
    limit = "" if ours.percent_of_limit is None else f"{ours.percent_of_limit:.0f}%"
    cells = (
        f"`{ours.case}`",
        other.impl,
        milliseconds(other.median_ms),
        ours.impl,
        milliseconds(ours.median_ms),
        f"{other.median_ms / ours.median_ms:.2f}x",
        limit,
        *(cell(row) for cell in beside for row in (other, ours)),
    )
    return "| " + " | ".join(cells) + " |"


def gibibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f} GiB"


def seconds(count: float | None) -> str:
    return "" if count is None else f"{count:.1f} s"


# Columns that are there where a row has such a value: title, field, cell.
BESIDE: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("memory", "peak_bytes", lambda row: gibibytes(row.peak_bytes)),
    ("saved for the backward", "saved_bytes", lambda row: gibibytes(row.saved_bytes)),
    ("compiled in", "compile_s", lambda row: seconds(row.compile_s)),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(argv)
    text = arguments.readme.read_text(encoding="utf-8")
    updated = update(text, arguments.results)
    if arguments.check:
        if updated != text:
            print(f"{arguments.readme}: its tables are out of date; run python benchmarks/tables.py", file=sys.stderr)
        return int(updated != text)
    if updated != text:
        arguments.readme.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
