"""When the norms' backward kernel runs well, and with which configurations it competes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """rows x row_size elements of itemsize bytes; tensors: how many are read or written; centered: LayerNorm."""

    rows: int
    row_size: int
    itemsize: int
    tensors: int
    centered: bool
    gated: bool = False


H200 = (9, 0)
# With fewer both are bound by their launches: at 64x4096 the formula takes 5.2 us, the kernel 6.3 at best.
ENOUGH_ELEMENTS = 1 << 23


def factor(problem: Problem, capability: tuple[int, int]) -> float:
    """Time of the formula, compiled alone, over the kernel's, rounded down; 1.0 where that was not measured.

    On an H200 with torch 2.11, bfloat16: RMSNorm 1.31 at 16384x4096, 1.28 at 65536x896, 1.52 at 8192x16384, 1.45 at
    16384x8192, 1.17 at 262144x128, 1.61 at 4096x2048, 1.93 at 2048x4096; with a residual add 1.23, 1.21 and 1.49 at the
    first three; LayerNorm 1.35 and 1.27 at the first two. Longer rows are read twice.
    """
    row_bytes = problem.row_size * problem.itemsize
    longest = 16384 if problem.centered else 32768
    measured = capability == H200 and problem.itemsize == 2 and row_bytes <= longest and not problem.gated
    if not measured or problem.rows * problem.row_size < ENOUGH_ELEMENTS:
        return 1.0
    if row_bytes <= 512:
        return 1.1
    if problem.rows <= 4096 and not problem.centered:
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
