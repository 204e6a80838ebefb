"""The command `infuse build`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from . import toolchain
from .arch_list import ARCH_LIST_VARIABLE, DEFAULT_ARCHITECTURES, architectures, parse_architectures
from .compilation import build
from .toolchain import BuildError


def main(argv: Sequence[str] | None = None) -> int:
    """`infuse build`: compile the library and say what was done. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="infuse build", description="Compile Infuse's CUDA kernels with nvcc.")
    parser.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        help='architecture, such as 9.0a or 8.0+PTX; may be repeated or hold several: "8.0;9.0a" '
        f"(default: {ARCH_LIST_VARIABLE}, else {', '.join(DEFAULT_ARCHITECTURES)})",
    )
    parser.add_argument("--jobs", type=int, help="compilers to run at once (default: MAX_JOBS, else one a processor)")
    parser.add_argument("--output", metavar="DIR", help="folder for the library (default: the cache)")
    parser.add_argument("--verbose", action="store_true", help="print the compilers' commands and output")
    arguments = parser.parse_args(argv)
    try:
        entries = " ".join(arguments.arch or []).replace(";", " ").split()
        archs = parse_architectures(entries) if entries else architectures()
        nvcc = toolchain.require_nvcc()
        print(f"compiling for {', '.join(archs)} with {nvcc} {toolchain.nvcc_version(nvcc)}")
        start = time.monotonic()
        path = build(archs, directory=arguments.output, jobs=arguments.jobs, verbose=arguments.verbose)
    except (BuildError, ValueError) as error:
        print(f"infuse build: {error}", file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - start:.1f} s)")
    return 0
