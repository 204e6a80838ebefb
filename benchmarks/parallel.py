"""A model over two GPUs: decode by tensor parallel and in a pipeline against one GPU, a training step under FSDP2.

    python benchmarks/parallel.py [--quick] [--cases REGEX] [--output DIR] [--list] [--device cpu] [--budget S]

It starts itself twice with torchrun. On GPUs Llama-3.1-8B's shapes in bf16 and NCCL, on a CPU a toy and gloo. A step's
time is the slower process's; of the cases of one device each process measures some, at the same time. Stock
torch.compile and Infuse take turns. Weights are random, answers are checked against the same model in a wider dtype.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from answers import WrongAnswer
from command import options_of, parser
from device import Device, describe_device
from harness import Options, Row, load
from implementations import optional
from model_shapes import Shape, llama_8b
from parallel_decode import DecodeCase, decode_cases
from parallel_timing import Measured
from parallel_training import TrainingCase
from report import print_case
from rows import append, new_run_id, results_file

__all__ = ["load", "main"]

WORLD_SIZE = 2
TINY = Shape("llama-tiny 2 layers", 64, 2, 4, 2, 128, 128, torch.float32)
Case = DecodeCase | TrainingCase


def cases(device_type: str, quick: bool) -> list[Case]:
    if quick or device_type == "cpu":
        decode, training = decode_cases(TINY, 128, None), TrainingCase(TINY, 32)
    else:
        decode, training = decode_cases(llama_8b(8), 4096, "reduce-overhead"), TrainingCase(llama_8b(4), 4096)
    return [*decode[:3], training, *decode[3:]]  # what a budget cuts off last is a batch of one


def row_of(case: Case, found: Measured, run_id: str, device: Device) -> Row:
    stats = found.stats
    return Row(
        run_id=run_id,
        case=case.name,
        impl=found.impl,
        median_ms=_round(stats.median_ms),
        p20_ms=_round(stats.p20_ms),
        p80_ms=_round(stats.p80_ms),
        bytes=case.bytes,
        flops=case.flops,
        percent_of_limit=None,  # the ceilings are one device's
        max_error=None if found.max_error is None else _round(found.max_error),
        peak_bytes=None,
        gpu=device.name,
        torch=device.torch_version,
        commit=device.commit,
        note=found.note,
    )


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def measure(case: Case, peers: Any, rounds: int) -> list[Measured] | str:
    """The case's times, or what was wrong, which on the other process is a ValueError."""
    found: list[Measured] | str
    try:
        found = case.measure(peers, rounds)
    except (WrongAnswer, ValueError) as error:
        found = f"{case.name}: {error}"
    torch._dynamo.reset()
    if peers.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def work(options: Options, device: Device, device_type: str) -> int:
    """One process's part. Returns the exit code."""
    begin, failures = time.perf_counter(), []
    chosen = [case for case in cases(device_type, options.quick) if re.search(options.cases, case.name)]
    alone, together = [case for case in chosen if case.is_alone], [case for case in chosen if not case.is_alone]
    with optional("infuse.models.parallel.process_group").process_group(device_type) as peers:
        runs = [[new_run_id()] for _ in range(peers.world_size)]
        dist.all_gather_object(runs, [new_run_id()])
        run_id = runs[0][0]
        groups: list[list[Case]] = [alone[start : start + WORLD_SIZE] for start in range(0, len(alone), WORLD_SIZE)]
        for group in [*groups, *([case] for case in together)]:
            late = torch.tensor(time.perf_counter() - begin > options.budget_s, device=peers.device).int()
            dist.all_reduce(late, dist.ReduceOp.MAX)
            if late.item():
                print(f"{group[0].name}: not started, the budget of {options.budget_s:.0f} s is spent", flush=True)
                continue
            mine = group[min(peers.rank, len(group) - 1)]
            said = [None] * peers.world_size
            dist.all_gather_object(said, (mine.name, measure(mine, peers, 5 if options.quick else 15)))
            if peers.rank == 0:
                failures += _record(group, dict(said[::-1]), said, run_id, device, options)
                print(f"  at {time.perf_counter() - begin:.0f} s", flush=True)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _record(
    group: Sequence[Case], first: dict[str, Any], said: Sequence[Any], run_id: str, device: Device, options: Options
) -> list[str]:
    """Keeps and prints the times of cases that no process found wrong; returns what was wrong with the others."""
    failures = [found for _, found in said if isinstance(found, str)]
    for case in group:
        found = first[case.name]
        if isinstance(found, str) or any(failure.startswith(case.name) for failure in failures):
            continue
        rows = [row_of(case, measured, run_id, device) for measured in found]
        if options.output is not None:
            append(results_file(options.output, device.name, "parallel"), rows)
        print(case.name, flush=True)
        print_case(rows)
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__ or "").parse_args(argv)
    options = options_of(arguments)
    device = describe_device(arguments.device)
    if arguments.list:
        for case in cases(device.type, options.quick):
            if re.search(options.cases, case.name):
                print(f"{case.name}: {', '.join(case.impls)}")
        return 0
    if "RANK" in os.environ:
        return work(options, device, device.type)
    print(device.describe(), flush=True)
    if device.type == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD_SIZE)]
    return subprocess.run([*launcher, __file__, *(sys.argv[1:] if argv is None else argv)], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
