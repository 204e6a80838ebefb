"""When the kernels of the norms run well, and with which configurations they compete."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """An operator's kind and rows x row_size elements of itemsize bytes."""

    kind: str
    rows: int
    row_size: int
    itemsize: int


def runs_well(problem: Problem) -> bool:
    """Whether the kernel is taken without a measurement.

    Never: Inductor's forward comes within 10% of an H200's copy bandwidth (benchmarks/results/nvidia-h200/norms.jsonl)
    and fuses with its neighbours, so a kernel that takes its place unmeasured can only lose.
    """
    del problem
    return False


def configurations(problem: Problem, available: int) -> tuple[int, ...]:
    """The launcher's configurations worth timing: its own choice (-1) and every one of its table."""
    del problem
    return (-1, *range(available))
