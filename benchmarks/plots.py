"""The figure of the whole models: how much faster than stock torch.compile, a bar a case.

    python benchmarks/plots.py [--output FILE] [--results DIR] [--device NAME]

From the rows of the table in README.md, which `python benchmarks/tables.py` makes together with this. The file says in
its metadata which rows it was drawn from, so that a figure that is out of date is found without drawing.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables
from report import milliseconds
from rows import RESULTS, Row, load

DEVICE = "nvidia-h200"
CASES = r"(?!mahia)"  # those have a table of their own
TITLES = {"decode": "decode", "prefill": "prefill", "train": "training step"}
COLORS = {"decode": "#3b82f6", "prefill": "#10a37f", "train": "#d97706"}  # seen on white and on black
INK = "#7d8590"  # likewise
_DIGEST = re.compile(rb"tEXtrows\x00([0-9a-f]{16})")

Pair = tuple[Row, Row]


def pairs(results: Path, device: str = DEVICE) -> dict[str, list[Pair]]:
    """(stock, Infuse) by kind of case, as they are drawn from top to bottom; kinds without results are left out."""
    path = results / device / "models.jsonl"
    found = tables.newest_pairs("models", load(path), CASES) if path.exists() else []
    kinds = {kind: [pair for pair in found if f" {kind}" in pair[0].case] for kind in tables.MODEL_STEPS}
    return {kind: of_kind for kind, of_kind in kinds.items() if of_kind}


def digest(groups: dict[str, list[Pair]]) -> str:
    """16 hex digits over all rows that are drawn."""
    lines = [row.to_json() for of_kind in groups.values() for pair in of_kind for row in pair]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def drawn_digest(path: Path) -> str:
    """The digest of the rows that a figure shows, "" without one."""
    match = _DIGEST.search(path.read_bytes()) if path.exists() else None
    return match[1].decode() if match is not None else ""


def label(case: str, kind: str) -> str:
    """A case's name on two lines, without its kind, which the colour says."""
    name, _, rest = case.partition(f" {kind}")
    rest = rest.removeprefix(",").strip()
    return f"{name}\n{rest} tokens" if rest.isdecimal() else f"{name}\n{rest}"


def draw(groups: dict[str, list[Pair]], path: Path) -> None:
    """Writes a PNG, transparent, in colours that are read on white and on black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = sum(len(of_kind) for of_kind in groups.values())
    figure, axes = pyplot.subplots(figsize=(9, 1.3 + 0.4 * (count + 0.5 * len(groups))), layout="constrained")
    place, places, names = 0.0, [], []
    for kind, of_kind in groups.items():
        for index, (stock, ours) in enumerate(of_kind):
            ratio = stock.median_ms / ours.median_ms
            axes.barh(place, ratio, color=COLORS[kind], height=0.7, label="" if index else TITLES[kind])
            times = (
                f" {ratio:.2f}x   {milliseconds(stock.median_ms)} \N{RIGHTWARDS ARROW} {milliseconds(ours.median_ms)}"
            )
            axes.text(ratio, place, times, va="center", color=INK, fontsize=8)
            places.append(place)
            names.append(label(stock.case, kind))
            place -= 1
        place -= 0.5
    axes.set_yticks(places, names, fontsize=8)
    _finish(axes, next(iter(groups.values()))[0][1])
    figure.savefig(path, dpi=120, transparent=True, metadata={"rows": digest(groups)})
    pyplot.close(figure)


def _finish(axes: Any, row: Row) -> None:
    """What stands around the bars."""
    axes.axvline(1.0, color=INK, linewidth=1, linestyle="--")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.4)  # room for the times
    axes.set_xlabel(f"speed over stock torch.compile's ({row.gpu}, torch {row.torch})", color=INK, fontsize=9)
    axes.tick_params(colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(TITLES)}
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, **above)


def update(results: Path, *, change: bool, device: str = DEVICE) -> list[Path]:
    """The figure's path if it is out of date, in a list; it is drawn anew if `change`."""
    groups, path = pairs(results, device), results / "models.png"
    if not groups or drawn_digest(path) == digest(groups):
        return []
    if change:
        draw(groups, path)
    return [path]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "models.png", metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--device", default=DEVICE, metavar="NAME")
    arguments = parser.parse_args(argv)
    groups = pairs(arguments.results, arguments.device)
    if not groups:
        print(f"no results of models for {arguments.device} in {arguments.results}")
        return 1
    draw(groups, arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
