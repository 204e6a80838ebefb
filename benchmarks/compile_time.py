"""What Infuse costs at compile time: torch.compile of the demo's decoder with and without it.

    python benchmarks/compile_time.py [--repeats N] [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Every measurement is a process of its own with empty caches; implementations take turns. Inductor itself is warmed up on
another function first, so that its imports and its search for a compiler are in nobody's time. Infuse's import, which a
process pays once, is told apart in the note, as is the time of the rewriting pass.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from answers import Output, bounds, check, tensors
from command import options_of, parser
from device import Device, describe_device
from harness import Row, Unavailable, load
from implementations import compiled, infuse_backend, optional, warm_up_compiler
from model_shapes import Shape
from model_sources import TORCHTUNE_LLAMA, Model
from report import print_case
from rows import append, new_run_id, results_file
from timing import summarise
from training_cases import Step

__all__ = ["load", "main"]

DEMO = Shape("llama3 4 layers, dim 256", 256, 4, 8, 4, 1024, 512, torch.float32)
QUICK = Shape("llama3 1 layer, dim 64", 64, 1, 4, 2, 128, 128, torch.float32)
KINDS = ("inference", "training")
IMPLS = ("compile", "infuse")
LENGTH = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """What one process reports, in milliseconds; pass_ms is in compile_ms, the import of Infuse is not."""

    compile_ms: float
    run_ms: float
    cpu_ms: float  # of this process and of the compilers it waited for: steadier than the clock on a shared machine
    pass_ms: float
    import_ms: float
    max_error: float


def shape_for(device_type: str, quick: bool) -> Shape:
    """fp32 on a CPU; on a GPU bf16, in which Infuse has kernels to choose."""
    shape = QUICK if quick else DEMO
    return dataclasses.replace(shape, dtype=torch.bfloat16) if device_type == "cuda" else shape


def time_passes() -> list[float]:
    """A list that the duration of every rewriting pass will be appended to, in milliseconds."""
    rewriting = optional("infuse.backend").InfusePass
    original = rewriting.__call__
    durations: list[float] = []

    def timed(self: Any, graph: torch.fx.Graph) -> None:
        begin = time.perf_counter()
        original(self, graph)
        durations.append((time.perf_counter() - begin) * 1e3)

    rewriting.__call__ = timed
    return durations


def child(device_type: str, kind: str, impl: str, quick: bool) -> Measurement:
    """One measurement, in this process."""
    device = describe_device(device_type)
    shape = shape_for(device_type, quick)
    torch.manual_seed(0)
    model = Model(TORCHTUNE_LLAMA, shape, device, LENGTH)
    module = model.get()
    tokens, targets = (torch.randint(shape.vocab_size, (1, LENGTH), device=device.torch_device) for _ in range(2))
    training = kind == "training"
    args = (tokens, targets) if training else (tokens,)

    def step(forward: Callable[..., Output], owner: Any) -> Callable[..., Output]:
        return Step(forward, owner) if training else forward

    call = model.loss if training else model.logits
    plain = call()
    exact = model.exact()
    with torch.set_grad_enabled(training):
        expected = step(call(exact), exact)(*args)
        allowed = bounds(step(plain, module)(*args), expected, shape.dtype, factor=3.0)
        warm_up_compiler(device.torch_device)
        begin = time.perf_counter()
        durations: list[float] = []
        if impl == "infuse":
            infuse_backend()
            durations = time_passes()
            optional("infuse.ops.library").missing(device.torch_device)
        imported, cpu = time.perf_counter(), cpu_seconds()
        backend = "infuse" if impl == "infuse" else "inductor"
        function = step(compiled(plain, impl, backend=backend).prepare(), module)
        answer = [tensor.clone() for tensor in tensors(function(*args))]
        device.synchronize()
        first, cpu = time.perf_counter(), cpu_seconds() - cpu
        function(*args)
        device.synchronize()
        run_ms = (time.perf_counter() - first) * 1e3
    error = check(impl, answer, expected, allowed)
    if impl == "infuse" and not durations:
        raise RuntimeError("compile_time: Infuse's pass did not run: a cache was warm, or the hook is out of date")
    return Measurement(
        (first - imported) * 1e3 - run_ms, run_ms, cpu * 1e3, sum(durations), (imported - begin) * 1e3, error
    )


def cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(device: Device, kind: str, impl: str, quick: bool) -> Measurement:
    """One measurement in a process of its own, with cache folders that nobody used before."""
    with tempfile.TemporaryDirectory(prefix="infuse-compile-time-") as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        }
        command = [sys.executable, __file__, "--child", device.type, kind, impl, *(["--quick"] if quick else [])]
        done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    if done.returncode == _UNAVAILABLE:
        raise Unavailable(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"{kind} {impl}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


_UNAVAILABLE = 3


def rows_of(results: dict[str, list[Measurement]], run_id: str, case: str, device: Device) -> list[Row]:
    rows = []
    for impl, measurements in results.items():
        stats = summarise([measurement.compile_ms for measurement in measurements])
        cpu_ms, pass_ms, import_ms = (
            summarise([getattr(measurement, name) for measurement in measurements]).median_ms
            for name in ("cpu_ms", "pass_ms", "import_ms")
        )
        note = f"{len(measurements)} processes, cpu_ms {cpu_ms:.0f}"
        if impl == "infuse":
            note += f", pass_ms {pass_ms:.1f} ({100 * pass_ms / stats.median_ms:.2f}%), import_ms {import_ms:.0f}"
        times = (round(stats.median_ms, 1), round(stats.p20_ms, 1), round(stats.p80_ms, 1))
        error = max(measurement.max_error for measurement in measurements)
        machine = (device.name, device.torch_version, device.commit)
        rows.append(Row(run_id, case, impl, *times, 0, 0, None, float(f"{error:.3g}"), None, *machine, note))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments_of = parser(__doc__ or "")
    arguments_of.add_argument("--repeats", type=int, default=3, metavar="N", help="processes for each (default: 3)")
    arguments_of.add_argument("--child", nargs=3, help="for this program's own use: one measurement, as JSON")
    arguments = arguments_of.parse_args(argv)
    if arguments.child:
        try:
            device_type, kind, impl = arguments.child
            print(json.dumps(dataclasses.asdict(child(device_type, kind, impl, arguments.quick))))
        except Unavailable as reason:
            print(reason, file=sys.stderr)
            return _UNAVAILABLE
        return 0
    begin = time.perf_counter()
    options = options_of(arguments)
    device = describe_device(arguments.device)
    shape = shape_for(device.type, options.quick)
    impls = [impl for impl in IMPLS if re.search(options.impl, impl)]
    cases = {f"torchtune {shape.name} {kind}": kind for kind in KINDS}
    cases = {case: kind for case, kind in cases.items() if re.search(options.cases, case)}
    if arguments.list:
        print(*(f"{case}: {', '.join(impls)}" for case in cases), sep="\n")
        return 0
    print(device.describe(), flush=True)
    run_id = new_run_id()
    failures = 0
    for case, kind in cases.items():
        if time.perf_counter() - begin > options.budget_s:
            print(f"{case}: not started, the budget of {options.budget_s:.0f} s is spent", flush=True)
            continue
        results: dict[str, list[Measurement]] = {}
        for impl in impls * (1 if options.quick else arguments.repeats):
            try:
                measurement = measure(device, kind, impl, options.quick)
            except Unavailable as reason:
                print(f"  {impl}: left out: {reason}", flush=True)
                continue
            except RuntimeError as failure:
                failures += 1
                print(f"  FAILED {failure}", file=sys.stderr, flush=True)
                continue
            results.setdefault(impl, []).append(measurement)
            print(f"  {case}: {impl}: {measurement.compile_ms / 1e3:.2f} s", flush=True)
        rows = rows_of(results, run_id, case, device)
        print(case)
        print_case(rows)
        if options.output is not None:
            append(results_file(options.output, device.name, "compile_time"), rows)
    print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
