"""Which kernels of linears are taken without a measurement.

Everything rests on what was measured (benchmarks/results/nvidia-h200/swiglu.jsonl).
"""

from __future__ import annotations

from infuse.lowering.heuristics import H200
from infuse.ops.linear_kernels import Sizes

FEWEST_TRAINED_ROWS = 2048
MOST_SKINNY_ROWS = 64


def runs_well(kind: str, family: str, sizes: Sizes, capability: tuple[int, int]) -> bool:
    """Whether a kernel is faster than what Inductor makes without tuning."""
    if capability != H200:
        return False
    return family == "skinny"


def packs_well(rows: int, capability: tuple[int, int]) -> bool:
    """Whether one product over packed weights is faster than several of one input."""
    return capability == H200 and rows > MOST_SKINNY_ROWS


def trains(sizes: Sizes, capability: tuple[int, int]) -> bool:
    """Whether both passes of a gated MLP are faster than what Inductor makes."""
    return capability == H200 and sizes.rows >= FEWEST_TRAINED_ROWS


def trained_piece_runs_well(name: str, capability: tuple[int, int]) -> bool:
    """Whether the kernel of a piece of a gated MLP that trains is faster than torch's products."""
    return capability == H200 and name in ("linear_gated_bwd", "linear_pair")
