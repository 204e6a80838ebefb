"""The tables of README.md and benchmarks/README.md and the figure of the whole models, made from benchmarks/results.

    python benchmarks/tables.py [--check] [--readme FILE] [--results DIR]

Nothing of them is typed by hand. A marker `<!-- results:norms -->` and the next `<!-- /results -->` enclose the table
of that benchmark; what stands between them is replaced. After the name a device may follow, and after it what the names
of cases match: `<!-- results:models nvidia-h200 (?!mahia) -->`. `<!-- support -->` likewise holds the table of support.
For each device and case the newest run is taken that has both Infuse and something to compare it with, of those with
max-autotune where there are any.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from report import is_infuse, milliseconds
from rows import RESULTS, Row, load

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
# Measured for the kernels' sake: not what torch.compile with Infuse gives a user. How such names begin.
NOT_FOR_USERS = "infuse-kernel"
# Whose tables show the memory that a call takes beyond its inputs, too.
ABOUT_MEMORY = ("linear_cross_entropy", "models")
# Cases that a benchmark had once and that others replace.
RETIRED = {"models": re.compile(r"llama-8b 2 layers"), "parallel": re.compile(r"compiled by layers")}
# In this order the cases of whole models are told.
MODEL_STEPS = ("decode", "prefill", "train")
_BLOCK = re.compile(
    r"(<!-- results:(?P<benchmark>\w+)(?: (?P<device>[\w*-]+))?(?: (?P<cases>[^\n]+?))? -->\n)"
    r"(?P<body>.*?)(<!-- /results -->)",
    re.DOTALL,
)
_SUPPORT = re.compile(r"(<!-- support -->\n).*?(<!-- /support -->)", re.DOTALL)


def update(readme_text: str, results_root: Path) -> str:
    """The text with every marked block made anew. A block with no results says so."""

    def fill(match: re.Match[str]) -> str:
        table = tables(match["benchmark"], results_root, match["device"] or "*", match["cases"] or "")
        return match[1] + table + match[match.re.groups]

    def fill_support(match: re.Match[str]) -> str:
        from support import table

        return match.group(1) + table() + match.group(2)

    return _SUPPORT.sub(fill_support, _BLOCK.sub(fill, readme_text))


def tables(benchmark: str, results_root: Path, device: str = "*", cases: str = "") -> str:
    """One Markdown table for each device that has results of this benchmark, of the cases that match an expression."""
    files = sorted(results_root.glob(f"{device}/{benchmark}.jsonl"))
    if benchmark == "coverage" and files:
        return "\n".join(coverage_table(path) for path in files)
    parts = [part for part in (device_table(benchmark, load(path), cases) for path in files) if part]
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


def newest_pairs(benchmark: str, rows: Sequence[Row], cases: str = "") -> list[tuple[Row, Row]]:
    """(best other, best Infuse) of each case that is measured still and that matches an expression."""
    retired = RETIRED.get(benchmark)
    names = [name for name in dict.fromkeys(row.case for row in rows) if not (retired and retired.search(name))]
    wanted = [name for name in names if re.match(cases, name)]
    if benchmark == "models":
        wanted.sort(key=_step_and_name)
    pairs = [newest_pair([row for row in rows if row.case == name]) for name in wanted]
    return [pair for pair in pairs if pair is not None]


def _step_and_name(case: str) -> tuple[int, str]:
    """What cases of whole models are sorted by; others come first, as they were measured."""
    for place, step in enumerate(MODEL_STEPS):
        if re.search(rf" {step}[ ,]", case):
            return place, case
    return -1, ""


def device_table(benchmark: str, rows: Sequence[Row], cases: str = "") -> str:
    """The best of Infuse against the best of the others, case by case; "" when no run has both."""
    pairs = newest_pairs(benchmark, rows, cases)
    if not pairs:
        return ""
    used = [row for pair in pairs for row in pair]
    beside = [
        (title, cell)
        for title, name, cell in BESIDE
        if any(getattr(row, name) is not None for row in used) and (name != "peak_bytes" or benchmark in ABOUT_MEMORY)
    ]
    against = against_eager(rows, pairs) if benchmark == "models" else []
    lines = [
        " ".join([line(*pair, [cell for _, cell in beside]), *(f"{cells[index]} |" for _, cells in against)])
        for index, pair in enumerate(pairs)
    ]
    torches, commits = (sorted({getattr(row, name) for row in used}) for name in ("torch", "commit"))
    caption = (
        f"`{used[-1].gpu}`, torch {', '.join(torches)}, commit {', '.join(commits)}, "
        f"`python benchmarks/{benchmark}.py`; above 1x Infuse is faster."
    )
    head = "| case | best without Infuse | | best with Infuse | | ratio | of the limit |"
    head += "".join(f" {title} without | with |" for title, _ in beside) + "".join(
        f" {title} |" for title, _ in against
    )
    rule = "|---|---|---:|---|---:|---:|---:|" + "---:|" * (2 * len(beside) + len(against))
    return "\n".join([caption, "", head, rule, *lines, ""])


def against_eager(rows: Sequence[Row], pairs: Sequence[tuple[Row, Row]]) -> list[tuple[str, list[str]]]:
    """Columns (title, a cell a pair) about the eager code of the same runs, where each has some."""
    found: list[list[str]] = []
    for _, ours in pairs:
        of_run = (row for row in rows if (row.run_id, row.case, row.impl) == (ours.run_id, ours.case, "eager"))
        eager = next(of_run, None)
        if eager is None:
            return []
        times = [milliseconds(eager.median_ms), f"{eager.median_ms / ours.median_ms:.2f}x"]
        found.append([*times, share(ours.peak_bytes, eager.peak_bytes), share(ours.saved_bytes, eager.saved_bytes)])
    columns = zip(("eager", "ratio to it", "of its memory", "of what it saves"), map(list, zip(*found)))
    return [(title, column) for title, column in columns if any(column)]


def newest_pair(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """(best other, best Infuse) of one case, from the last run in the file that has both, with max-autotune if any."""
    found: list[tuple[Row, Row]] = []
    for run_id in dict.fromkeys(row.run_id for row in rows):
        run = [row for row in rows if row.run_id == run_id and not row.impl.startswith(NOT_FOR_USERS)]
        ours = [row for row in run if is_infuse(row.impl)]
        others = [row for row in run if not is_infuse(row.impl)]
        if ours and others:
            found.append((min(others, key=lambda row: row.median_ms), min(ours, key=lambda row: row.median_ms)))
    tuned = {row.run_id for row in rows if row.impl == "compile-max-autotune"}
    tuned &= {row.run_id for row in rows if row.impl == "infuse-max-autotune"}
    return next((pair for pair in reversed(found) if pair[0].run_id in tuned), found[-1] if found else None)


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


def share(part: int | None, whole: int | None) -> str:
    return f"{100 * part / whole:.0f}%" if part is not None and whole else ""


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
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="this file alone (default: both and the figure)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(argv)
    outdated: list[Path] = []
    for path in DOCUMENTS if arguments.readme is None else (arguments.readme,):
        text = path.read_text(encoding="utf-8")
        updated = update(text, arguments.results)
        if updated != text:
            outdated.append(path)
            if not arguments.check:
                path.write_text(updated, encoding="utf-8")
    if arguments.readme is None:
        import plots

        outdated += plots.update(arguments.results, change=not arguments.check)
    if arguments.check:
        for path in outdated:
            print(f"{path}: out of date; run python benchmarks/tables.py", file=sys.stderr)
    return int(bool(outdated) and arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
