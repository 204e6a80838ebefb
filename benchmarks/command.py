"""The command line that all benchmark files share."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from device import Device, describe_device
from harness import Case, CaseFailed, Options, Session
from report import print_case
from rows import RESULTS


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output", type=Path, metavar="DIR", help="root of the results (default: benchmarks/results)")
    result.add_argument("--quick", action="store_true", help="toy sizes and few rounds; recorded only with --output")
    result.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name has a match")
    result.add_argument("--impl", default="", metavar="REGEX", help="only implementations whose name has a match")
    result.add_argument("--list", action="store_true", help="print cases and implementations, measure nothing")
    result.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    result.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no case after S seconds")
    result.add_argument("--warm", action="store_true", help="use the compiler's caches; records no compile time")
    return result


def options_of(arguments: argparse.Namespace) -> Options:
    output = arguments.output or (None if arguments.quick else RESULTS)
    return Options(output, arguments.quick, arguments.cases, arguments.impl, arguments.budget, arguments.warm)


def start(benchmark: str, options: Options, device: Device) -> Session:
    """A session, after its environment is printed."""
    print(device.describe(), flush=True)
    session = Session(benchmark, options, device)
    print(f"run {session.run_id}, {session.ceilings.describe()}, results: {session.path or 'not kept'}", flush=True)
    return session


def main(
    benchmark: str,
    description: str | None,
    cases: Callable[[Device, bool], Iterable[Case]],
    argv: Sequence[str] | None = None,
) -> int:
    """The program of a benchmark file; `cases` gets the device and whether the run is quick. Returns the exit code."""
    begin = time.perf_counter()
    arguments = parser(description or "").parse_args(argv)
    options = options_of(arguments)
    device = describe_device(arguments.device)
    chosen = [case for case in cases(device, options.quick) if re.search(options.cases, case.name)]
    if arguments.list:
        for case in chosen:
            names = [impl.name for impl in case.impls if re.search(options.impl, impl.name)]
            print(f"{case.name}: {', '.join(names)}")
        return 0
    session = start(benchmark, options, device)
    failures = []
    for case in chosen:
        if time.perf_counter() - begin > options.budget_s:
            print(f"{case.name}: not started, the budget of {options.budget_s:.0f} s is spent", flush=True)
            continue
        print(case.name, flush=True)
        try:
            print_case(session.measure(case))
        except CaseFailed as failed:
            print_case(failed.rows)
            failures.append(str(failed))
    print(f"{time.perf_counter() - begin:.0f} s, ceilings {session.ceilings.describe()}", flush=True)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
