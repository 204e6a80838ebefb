"""When the norms' backward kernel runs well, and with which configurations it competes."""

from __future__ import annotations

from dataclasses import dataclass

from infuse.lowering.heuristics import H200


@dataclass(frozen=True, slots=True)
class Problem:
    """rows x row_size elements of itemsize bytes; tensors: how many are read or written; centered: LayerNorm."""

    rows: int
    row_size: int
    itemsize: int
    tensors: int
    centered: bool
    gated: bool = False


# With fewer both are bound by their launches: at 64x4096 the formula takes 5.2 us, the kernel 6.3 at best.
ENOUGH_ELEMENTS = 1 << 23


# Shared memory for two stages of a row of every tensor that is read; longer rows are read twice.
RING_BYTES = 216 * 1024


def factor(problem: Problem, capability: tuple[int, int]) -> float:
    """Time of the formula, compiled alone, over the kernel's, rounded down; 1.0 where that was not measured.

    On an H200 with torch 2.11, bfloat16: RMSNorm 1.30 at 16384x4096, 1.25 at 65536x896, 1.58 at 8192x16384, 1.45 at
    16384x8192, 1.17 at 262144x128, 1.61 at 4096x2048, 1.93 at 2048x4096; with a residual add 1.21, 1.21 and 1.54 at the
    first three; LayerNorm 1.35 and 1.27 at the first two; gated 1.31 at 16384x4096 and 1.75 at 8192x8192. Sums before
    and behind it are read by both alike: nine norms of four layers, 4096x4096, whose gradients are sums of two and
    three products, took 434 us instead of 688, sums of parts left out.
    """
    row_bytes = problem.row_size * problem.itemsize
    longest = 16384 if problem.centered or problem.gated else 32768
    once = row_bytes <= longest and 2 * (problem.tensors - 1) * row_bytes <= RING_BYTES
    measured = capability == H200 and problem.itemsize == 2 and once
    if not measured or problem.rows * problem.row_size < ENOUGH_ELEMENTS:
        return 1.0
    if row_bytes <= 512:
        return 1.1
    if problem.rows <= 4096 and not problem.centered and not problem.gated:
        return 1.6
    return 1.4 if row_bytes > 16384 else 1.2


def expected_times(problem: Problem, capability: tuple[int, int]) -> dict[str, float]:
    """Times of formula and kernel in units of a pass over one tensor by the formula."""
    return {"decomposition": problem.tensors, "kernel_-1": problem.tensors / factor(problem, capability)}


def runs_well(problem: Problem, capability: tuple[int, int]) -> bool:
    """Whether the kernel is faster than the formula where nothing fuses with either."""
    times = expected_times(problem, capability)
    return times["kernel_-1"] < times["decomposition"]


def configurations(available: int) -> tuple[int, ...]:
    """The launcher's configurations worth timing: its own choice (-1) and every one of its table."""
    return (-1, *range(available))
