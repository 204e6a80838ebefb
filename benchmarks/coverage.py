"""How much of a zoo of models Infuse catches: sites that it rewrites against those that an eager run executes.

    python benchmarks/coverage.py [--models GLOB] [--quick] [--all] [--compile] [--processes N] [--misses DIR]
                                  [--output DIR] [--list]

True counts come from a record of an eager run (census/) or, for hand-written models, from their authors. The rewritten
graphs run as well, and outputs and gradients are compared with float64: their error may not exceed that of the
unchanged model. By default inference and training in fp32 and bf16 with static shapes; --quick is inference in fp32,
--all adds dynamic shapes; what covers only a part is kept only with --output. --compile generates code with Infuse and
with stock Inductor, and stock's error is the bound.
Exit code 1 when a rewrite goes beyond the true count, or a result is less exact than the bound.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import itertools
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from census.counting import KINDS
from coverage_misses import write_misses
from coverage_rows import CoverageRow, append, fraction, totals
from coverage_run import Configuration, Result, measure
from device import describe_device
from rows import RESULTS, new_run_id, results_file
from zoo import entries
from zoo.entry import Entry


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--models", default="*", metavar="GLOB", help="only models whose name matches")
    result.add_argument("--files", default="*", metavar="GLOB", help="only models of these files of the zoo")
    result.add_argument("--quick", action="store_true", help="inference in fp32 only; recorded only with --output")
    result.add_argument("--all", action="store_true", help="dynamic shapes too")
    result.add_argument("--only", default="", metavar="TEXT", help="only configurations with this text in their name")
    result.add_argument("--compile", action="store_true", help="generate code, and compare with stock Inductor")
    result.add_argument("--processes", type=int, default=1, metavar="N", help="models measured at a time (default: 1)")
    result.add_argument("--output", type=Path, metavar="DIR", help="root of the results (default: benchmarks/results)")
    result.add_argument("--misses", type=Path, metavar="DIR", help="write one file a kind with the sites left over")
    result.add_argument("--list", action="store_true", help="print the models' names, measure nothing")
    return result


def configurations(arguments: argparse.Namespace) -> list[Configuration]:
    if arguments.quick:
        return [Configuration()]
    dynamics = (False, True) if arguments.all else (False,)
    choices = itertools.product(dynamics, (False, True), (torch.float32, torch.bfloat16))
    found = [Configuration(training, dtype, dynamic) for dynamic, training, dtype in choices]
    return [
        item
        for item in found
        if arguments.only in CoverageRow("", "", item.training, item.dtype_name, item.dynamic).configuration
    ]


def line(row: CoverageRow) -> str:
    """One row for the terminal: fused/in the graph of each kind, what is left, errors."""
    kinds = [
        f"{kind} {row.fused.get(kind, 0)}/{row.in_graph.get(kind, 0)}"
        + (f" of {row.true[kind]}" if row.true.get(kind, 0) != row.in_graph.get(kind, 0) else "")
        + (f" REFUSED {row.refused[kind]}" if row.refused.get(kind) else "")
        + (f" MISSED {row.missed()[kind]}" if row.missed().get(kind) else "")
        + (f" BEYOND {row.over[kind]}" if row.over.get(kind) else "")
        for kind in KINDS
        if row.true.get(kind) or row.fused.get(kind) or row.over.get(kind) or row.refused.get(kind)
    ]
    errors = ""
    if row.accurate is False:
        errors = f"; INEXACT out {row.output_error:.1e} ({row.eager_output_error:.1e})" + (
            f", grad {row.grad_error:.1e} ({row.eager_grad_error:.1e})" if row.grad_error is not None else ""
        )
    if row.error:
        errors += f"; ERROR {row.error}"
    return f"{row.model} [{row.configuration}]: {', '.join(kinds) or 'no sites'}; graphs {row.graphs}{errors}"


def summary(rows: Sequence[CoverageRow]) -> str:
    """Totals by configuration and kind, and the reasons of the refusals."""
    lines = []
    for name in dict.fromkeys(row.configuration for row in rows):
        chosen = [row for row in rows if row.configuration == name]
        total = totals(chosen)
        lines.append(f"{name}: {len(chosen)} models, {sum(bool(row.error) for row in chosen)} failed")
        for kind in KINDS:
            lines.append(
                f"  {kind:12} fused {fraction(total['fused'][kind], total['in_graph'][kind]):22} "
                f"refused {total['refused'][kind]:4} missed {total['missed'][kind]:4} beyond {total['over'][kind]:4} "
                f"outside graphs {total['true'][kind] - total['in_graph'][kind]}"
            )
        lines.append(f"  {'all':12} fused {fraction(total['fused'].total(), total['in_graph'].total())}")
        compared = [row for row in chosen if row.accurate is not None]
        lines.append(
            f"  as exact as the bound: {sum(bool(row.accurate) for row in compared)} of {len(compared)} compared"
        )
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Task:
    """One model in all configurations; labels: the rows' gpu, torch and commit."""

    name: str
    files: str
    chosen: Sequence[Configuration]
    run_id: str
    compiled: str
    labels: Mapping[str, str]


@functools.cache
def _zoo(files: str) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries(files)}


def _measured(task: Task) -> list[Result]:
    _quiet()
    entry = _zoo(task.files)[task.name]
    return [
        measure(entry, configuration, task.run_id, task.compiled, task.labels)
        for configuration in task.chosen
        if entry.trains or not configuration.training
    ]


def _results(tasks: Sequence[Task], processes: int) -> Iterator[list[Result]]:
    """In the order of the tasks; several processes share the machine, one thread each."""
    if processes == 1:
        yield from map(_measured, tasks)
        return
    # Not forked: torch's threads do not survive that.
    with get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap(_measured, tasks)


def run(tasks: Sequence[Task], processes: int, path: Path | None) -> list[Result]:
    """Measures each model in each configuration, prints and stores a row at a time."""
    results = []
    for found in _results(tasks, processes):
        for result in found:
            results.append(result)
            print(line(result.row), flush=True)
            if path is not None:
                append(path, [result.row])
    return results


def main(argv: Sequence[str] | None = None) -> int:
    begin = time.perf_counter()
    arguments = parser().parse_args(argv)
    _quiet()
    names = fnmatch.filter(_zoo(arguments.files), arguments.models)
    if arguments.list:
        print("\n".join(names))
        return 0
    is_part = arguments.quick or arguments.only or arguments.models != "*" or arguments.files != "*"
    root = arguments.output or (None if is_part else RESULTS)
    device = describe_device("cpu")
    # Their errors stand beside others: those of stock Inductor.
    name = "coverage_compile" if arguments.compile else "coverage"
    path = results_file(root, device.name, name) if root else None
    labels = {"gpu": device.name, "torch": device.torch_version, "commit": device.commit}
    compiled = "inductor" if arguments.compile else ""
    plan = (arguments.files, configurations(arguments), new_run_id(), compiled, labels)
    results = run([Task(name, *plan) for name in names], arguments.processes, path)
    rows = [result.row for result in results]
    print(summary(rows))
    print(f"{time.perf_counter() - begin:.0f} s, results: {path or 'not kept'}")
    if arguments.misses:
        write_misses(results, arguments.misses)
    return int(any(row.over or row.accurate is False for row in rows))


def _quiet() -> None:
    """Hides what libraries say about tiny configurations."""
    warnings.simplefilter("ignore")
    for name in ("transformers", "torchao", "torch.utils._pytree", "torch._dynamo", "torch.fx", "torch._subclasses"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    raise SystemExit(main())
