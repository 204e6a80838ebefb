"""The measuring core of every benchmark file: a file describes its cases, this does the rest.

For each case: inputs are made, the answer is computed in fp64, every implementation is prepared and its answer checked,
all are timed in turn, the answers of the timed runs are checked again, and the rows go to
`<results>/<gpu>/<benchmark>.jsonl`. A wrong answer, or a time that the device's own ceilings say is impossible, is
never recorded: it raises CaseFailed.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
from answers import Function, Output, WrongAnswer, bounds, check
from costs import CostMeter, Costs
from device import Ceilings, Device, describe_device
from implementations import Impl, Unavailable, compiled, compiled_pairs, eager
from rows import CACHE_RESIDENT, RESULTS, ROOFLINE_PERCENT, Row, append, load, new_run_id, results_file
from timing import Calls, Inputs, Replay, Sampler, Stats, Timed, paired_ratio
from torch import Tensor

__all__ = [
    "AboveRoofline",
    "Case",
    "CaseFailed",
    "Device",
    "Function",
    "Impl",
    "Inputs",
    "Options",
    "Output",
    "Row",
    "Session",
    "Stats",
    "Unavailable",
    "WrongAnswer",
    "compiled",
    "compiled_pairs",
    "eager",
    "load",
]

_SEED = 20_240_229


class AboveRoofline(RuntimeError):
    """Faster than memory and matmul units allow: the work, the count of it or the clock is wrong."""


class CaseFailed(RuntimeError):
    """Some implementations of a case failed: `failures` has their reasons, `rows` are the others' and are recorded."""

    def __init__(self, case: str, failures: dict[str, Exception], rows: Sequence[Row]) -> None:
        self.failures = failures
        self.rows = rows
        super().__init__(f"{case}: " + "; ".join(f"{name}: {brief(error)}" for name, error in failures.items()))


def brief(error: Exception) -> str:
    """The kind of an error and the first line of its text, which for a compiler's error goes on for pages."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. output None: rows are checked and returned, not kept."""

    output: Path | None = RESULTS
    quick: bool = False
    cases: str = ""
    impl: str = ""
    budget_s: float = float("inf")
    warm: bool = False  # the compiler's caches are used: no compile time is recorded


@dataclass(frozen=True, slots=True)
class Case:
    """A problem with its inputs, its floor and those who compete on it.

    bytes, flops: the fewest that any implementation of the whole case must move and do.
    eager: the function as its author wrote it; its rounding in `dtype` bounds the error of all others.
    reference: the same in fp64, called with the inputs in fp64.
    """

    name: str
    inputs: Callable[[torch.Generator], Inputs]
    eager: Function
    reference: Function
    impls: Sequence[Impl]
    bytes: int
    flops: int
    dtype: torch.dtype
    sets: int = 0  # input sets; 0: as many as make a sample long enough and leave the last-level cache cold
    calls: int = 0  # calls a sample; 0: one for each set
    grad: bool = False
    tolerance_factor: float = 2.0
    reset: Callable[[], None] = lambda: None  # puts back what a call changes, outside the clock
    release: Callable[[], None] = lambda: None  # called when the case is done: gives back memory that it holds
    cache_resident: bool = False
    cold: bool = False  # each implementation is compiled with empty caches, and the time of that is recorded


@dataclass(frozen=True, slots=True)
class Contestant:
    """An implementation that gave the right answer and is ready to be timed."""

    impl: Impl
    function: Function  # a method `remark` of it, if there is one, adds to the rows' notes
    timed: Timed
    costs: Costs


class Session:
    """One run: a device, its ceilings, a run_id, and the file that the rows go to."""

    def __init__(self, benchmark: str, options: Options, device: Device | None = None) -> None:
        self.options = options
        self.device = device or describe_device()
        self.ceilings = Ceilings(self.device, quick=options.quick)
        self.run_id = new_run_id()
        root = options.output
        self.path = None if root is None else results_file(root, self.device.name, benchmark)
        self._recorded_ceilings: dict[str, float] = {}
        self._meter = CostMeter(self.device)

    def measure(self, case: Case) -> list[Row]:
        """Times a case and records it. Raises CaseFailed, after recording the others, when an implementation failed."""
        rows: list[Row] = []
        failures: dict[str, Exception] = {}
        try:
            with torch.set_grad_enabled(case.grad):
                self._measure(case, rows, failures)
        except Unavailable as reason:
            print(f"  left out: {reason}", flush=True)
        except Exception as error:  # the other cases must not be lost
            failures["inputs, reference or timing"] = error
        torch._dynamo.reset()
        case.release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.record(rows)
        if failures:
            raise CaseFailed(case.name, failures, rows)
        return rows

    def record(self, rows: Sequence[Row]) -> None:
        """Appends rows, and before them the ceilings that their percentages are of."""
        if self.path is not None and rows:
            append(self.path, [*self._ceiling_rows(), *rows])

    def row(self, case: Case, found: Contestant, stats: Stats, error: float | None, note: str) -> Row:
        """Raises AboveRoofline."""
        resident, costs = self._cache_resident(case), found.costs
        percent = self._percent_of_limit(case, stats)
        if percent > ROOFLINE_PERCENT and not resident:
            self.ceilings.again()
            percent = self._percent_of_limit(case, stats)
        if percent > ROOFLINE_PERCENT and not resident:
            raise AboveRoofline(f"{stats.median_ms:.4g} ms is {percent:.0f}% of what the device can do")
        return Row(
            run_id=self.run_id,
            case=case.name,
            impl=found.impl.name,
            median_ms=_round(stats.median_ms),
            p20_ms=_round(stats.p20_ms),
            p80_ms=_round(stats.p80_ms),
            bytes=case.bytes,
            flops=case.flops,
            percent_of_limit=_round(percent),
            max_error=None if error is None else _round(error),
            peak_bytes=costs.peak_bytes,
            gpu=self.device.name,
            torch=self.device.torch_version,
            commit=self.device.commit,
            note=", ".join(filter(None, [note, CACHE_RESIDENT if resident else ""])),
            compile_s=None if costs.compile_s is None else _round(costs.compile_s),
            saved_bytes=costs.saved and costs.saved[0],
            saved_gradient_bytes=costs.saved and costs.saved[1],
        )

    def _percent_of_limit(self, case: Case, stats: Stats) -> float:
        return 100 * self.ceilings.floor_ms(case.bytes, case.flops, case.dtype) / stats.median_ms

    def _measure(self, case: Case, rows: list[Row], failures: dict[str, Exception]) -> None:
        """Fills `rows` and `failures`."""
        begin = time.perf_counter()
        inputs = self._input_sets(case)
        expected = {index: case.reference(*map(_fp64, inputs[index])) for index in {0, len(inputs) - 1}}
        case.reset()
        allowed = bounds(case.eager(*inputs[0]), expected[0], case.dtype, case.tolerance_factor)
        print(f"  inputs and answers in fp64 in {time.perf_counter() - begin:.1f} s", flush=True)
        contestants: list[Contestant] = []
        for impl in case.impls:
            if re.search(self.options.impl, impl.name):
                try:
                    contestants.append(self._prepare(case, impl, inputs, expected[0], allowed))
                except Unavailable as reason:
                    print(f"  {impl.name}: left out: {reason}", flush=True)
                except Exception as failed:  # the others' times must not be lost
                    failures[impl.name] = failed
                    print(f"  {impl.name}: FAILED: {brief(failed)}", flush=True)
        if not contestants:
            return
        sampler = Sampler(self.device, case.reset)
        timed = [contestant.timed for contestant in contestants]
        with torch._dynamo.config.patch(error_on_recompile=True):
            stats = sampler.rounds(timed, self._rounds(sampler, timed))
        for contestant in contestants:
            name = contestant.impl.name
            try:
                answers = [(found, expected[index]) for index, found in contestant.timed.last if index in expected]
                error = max(check("timed run", found, right, allowed) for found, right in answers)
                remark = getattr(contestant.function, "remark", str)
                note = ", ".join(filter(None, [contestant.impl.note, remark(), _paired_note(name, stats)]))
                rows.append(self.row(case, contestant, stats[name], error, note))
            except (WrongAnswer, AboveRoofline) as failure:
                failures[name] = failure

    def _prepare(
        self, case: Case, impl: Impl, inputs: Sequence[Inputs], expected: Output, allowed: Sequence[float]
    ) -> Contestant:
        """Compiles, warms up and checks."""
        begin = time.perf_counter()
        case.reset()
        function, compile_s = self._meter.first_call(impl, inputs[0], cold=case.cold and not self.options.warm)
        # The second call records CUDA graphs, where the mode has them: their memory is taken then.
        peak_bytes = self._meter.peak_bytes(function, inputs[0], case.reset)
        case.reset()
        answer = function(*inputs[0])
        check("first run", answer, expected, allowed)
        del answer
        costs = Costs(compile_s, peak_bytes, self._meter.saved(function, inputs[0], case.reset))
        case.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            if impl.capture and self.device.type == "cuda":
                timed: Timed = Replay(impl.name, function, inputs)
            else:
                timed = Calls(impl.name, function, inputs, case.calls or len(inputs))
            timed.run()
        self.device.synchronize()
        print(f"  {impl.name}: ready in {time.perf_counter() - begin:.1f} s", flush=True)
        return Contestant(impl, function, timed, costs)

    def _input_sets(self, case: Case) -> list[Inputs]:
        """Enough sets that a sample takes a while and no set is still in the last-level cache when its turn comes."""
        generator = torch.Generator(self.device.type).manual_seed(_SEED)
        first = case.inputs(generator)
        count = case.sets
        if not count:
            size = sum(tensor.numel() * tensor.element_size() for tensor in first)
            if self.device.type == "cuda":
                floor_ms = self.ceilings.floor_ms(case.bytes, case.flops, case.dtype)
                count = min(max(round(0.3 / floor_ms), 3 * self.device.cache_bytes // size, 3), 32)
            else:
                count = min(max(2 * self.device.cache_bytes // size, 2), 8)
        return [first, *(case.inputs(generator) for _ in range(count - 1))]

    def _cache_resident(self, case: Case) -> bool:
        """Declared, or on a CPU a case whose few sets leave much of themselves in its large cache."""
        return case.cache_resident or (self.device.type == "cpu" and case.bytes * 4 < self.device.cache_bytes)

    def _rounds(self, sampler: Sampler, contestants: Sequence[Timed]) -> int:
        """As many rounds as take about a second for the slowest."""
        if self.options.quick:
            return 5
        slowest = max(sampler.sample(timed) * timed.calls for timed in contestants)
        return min(max(round(1000 / slowest), 21), 101)

    def _ceiling_rows(self) -> list[Row]:
        """The ceilings measured since the last call, as rows of their own, so that percentages can be traced."""
        device, rows = self.device, []
        for name, (seconds, bytes_, flops) in self.ceilings.times.items():
            if self._recorded_ceilings.get(name) != seconds:
                self._recorded_ceilings[name] = seconds
                ms = _round(seconds * 1e3)
                shared = (device.name, device.torch_version, device.commit, f"fastest of several; {device.describe()}")
                rows.append(Row(self.run_id, name, "torch", ms, ms, ms, bytes_, flops, None, None, None, *shared))
        return rows


def _paired_note(name: str, stats: dict[str, Stats]) -> str:
    """For an Infuse row: its time over stock's in the same mode, from the same rounds."""
    partner = name.replace("infuse", "compile", 1)
    if partner == name or partner not in stats:
        return ""
    ratio = paired_ratio(stats[name].samples, stats[partner].samples)
    return f"{ratio.median_ms:.3f} [{ratio.p20_ms:.3f}, {ratio.p80_ms:.3f}] of {partner}'s time, paired"


def _fp64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _round(value: float) -> float:
    """Five significant digits: more is noise."""
    return float(f"{value:.5g}")
