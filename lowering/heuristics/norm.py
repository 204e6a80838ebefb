"""When the kernels of the norms run well, and with which configurations they compete."""

from __future__ import annotations

from dataclasses import dataclass

# Where the kernel beats what torch.compile generates without tuning by more than profit.MARGIN on an H200
# (benchmarks/results/nvidia-h200/norms.jsonl): kind, elements of a row, bytes of an element ->
# the rows that were measured. At other sizes Inductor comes as near to the memory's bandwidth, or nobody has looked.
MEASURED_WINS = {("rms_norm", 4096, 2): 16384, ("layer_norm", 4096, 2): 16384}
MEASURED_ON = (9, 0)


@dataclass(frozen=True, slots=True)
class Problem:
    """An operator's kind and rows x row_size elements of itemsize bytes. capability: of the GPU."""

    kind: str
    rows: int
    row_size: int
    itemsize: int
    capability: tuple[int, int]


def runs_well(problem: Problem) -> bool:
    """Whether the kernel is taken without a measurement, where nothing around it could fuse with the formula."""
    measured = MEASURED_WINS.get((problem.kind, problem.row_size, problem.itemsize))
    return measured is not None and problem.rows >= measured and problem.capability == MEASURED_ON


def configurations(problem: Problem, available: int) -> tuple[int, ...]:
    """The launcher's configurations worth timing: its own choice (-1) and every one of its table."""
    del problem
    return (-1, *range(available))
