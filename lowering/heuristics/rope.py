"""When the rotary kernels run well, and with which configurations they compete."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """rows x row_size elements of itemsize bytes, one row a head. interleaved: pairs are neighbours in a row."""

    rows: int
    row_size: int
    itemsize: int
    interleaved: bool
    has_norm: bool


def runs_well(problem: Problem) -> bool:
    """Whether the kernel is taken without a measurement, where it costs the neighbours no fusion.

    With a norm, or pairs of neighbours in a row (benchmarks/results/nvidia-h200/rope.jsonl): Inductor reads such pairs
    in accesses of two bytes, and a row that is both reduced and turned twice. Halves alone it turns as fast.
    """
    return problem.has_norm or problem.interleaved


def cache_write_runs_well(problem: Problem) -> bool:
    """Whether rotations and cache writes are taken out of the graph for one kernel. problem: q's."""
    del problem
    return True


def configurations(problem: Problem, available: int) -> tuple[int, ...]:
    """The launcher's configurations worth timing: its own choice (-1) and every one of its table."""
    del problem
    return (-1, *range(available))
