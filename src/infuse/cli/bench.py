"""`infuse bench`: the benchmarks of a checkout, each a program of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from infuse.cli.arguments import Parser, UserError

# The package lies in src/infuse of a checkout.
FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="infuse bench",
        description="Run the benchmarks of a checkout. "
        "Options behind the name are the benchmark's own (--quick, --list, --help).",
    )
    parser.add_argument("name", nargs="?", help="which one (default: list them), or `all`")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed on to it")
    arguments = parser.parse_args(argv)
    programs = benchmarks(FOLDER)
    if not programs:
        raise UserError(
            "bench: got an installed package, expected a checkout: the benchmarks are in its folder benchmarks/"
        )
    if arguments.name is None:
        print(f"benchmarks in {FOLDER}:")
        for name, path in programs.items():
            print(f"  {name:<14}{_summary(path)}")
        print("`infuse bench NAME --help` shows the options of one.")
        return 0
    if arguments.name not in (*programs, "all"):
        raise UserError(f"bench: got {arguments.name!r}, expected one of {', '.join([*programs, 'all'])}")
    chosen = list(programs) if arguments.name == "all" else [arguments.name]
    codes = [subprocess.run([sys.executable, str(programs[name]), *arguments.options]).returncode for name in chosen]
    return max(codes, key=abs)


def benchmarks(folder: Path) -> dict[str, Path]:
    """The programs by name: the files that share the benchmarks' command line; the others there serve them."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(line.startswith("from command import") for line in lines):
            found[path.stem] = path
    return found


def _summary(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].strip('"')
