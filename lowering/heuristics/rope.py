"""When the rotary kernels run well, and with which configurations they compete."""

from __future__ import annotations

from dataclasses import dataclass

from infuse.lowering.heuristics import H200


@dataclass(frozen=True, slots=True)
class Problem:
    """rows x row_size elements of itemsize bytes, one row a head, on a GPU of a compute capability.

    interleaved: pairs are neighbours in a row.
    """

    rows: int
    row_size: int
    itemsize: int
    interleaved: bool
    has_norm: bool
    capability: tuple[int, int]


# Below, launches count and not bytes: Inductor puts q's and k's rotations, and what is around them, into one kernel.
_MANY_ELEMENTS = 2**20


def is_measured(problem: Problem) -> bool:
    """Whether results are stored for such a device and dtype; without them only max-autotune takes a kernel."""
    return problem.capability == H200 and problem.itemsize == 2


def is_large(problem: Problem) -> bool:
    """Whether a rotation may leave the graph that Inductor fuses at all."""
    return problem.rows * problem.row_size >= _MANY_ELEMENTS


def runs_well(problem: Problem) -> bool:
    """Whether the kernel is taken without a measurement, where it costs the neighbours no fusion.

    Pairs of neighbours in a row Inductor reads in accesses of two bytes, and it reads normalised rows twice; halves
    alone it turns as fast (benchmarks/results/nvidia-h200/rope.jsonl).
    """
    return is_measured(problem) and is_large(problem) and (problem.interleaved or problem.has_norm)


def pair_runs_well(problem: Problem) -> bool:
    """The same for q and k in one launch. problem: the rows of both."""
    return is_measured(problem) and (problem.has_norm or runs_well(problem))


def configurations(problem: Problem, available: int) -> tuple[int, ...]:
    """The launcher's configurations worth timing: its own choice (-1) and every one of its table."""
    del problem
    return (-1, *range(available))
