"""Which kernels of linears are taken without a measurement.

Everything rests on what was measured (benchmarks/results/nvidia-h200/swiglu.jsonl).
"""

from __future__ import annotations

from infuse.lowering.heuristics import H200
from infuse.ops.linear_kernels import Sizes

MOST_SKINNY_ROWS = 64
# From here on, where gate and up together are at least so large.
FEWEST_GATED_ROWS, FEWEST_TRAINED_ROWS = 128, 2048
LARGE_INPUTS, LARGE_OUTPUTS = 2048, 8192
LARGE_EXPERT = 1024  # inputs, and outputs of gate and up together


def runs_well(kind: str, family: str, sizes: Sizes, capability: tuple[int, int]) -> bool:
    """Whether a kernel is faster than what Inductor makes without tuning."""
    if capability != H200:
        return False
    if kind == "grouped_linear_swiglu":
        return min(sizes.inputs, sizes.outputs) >= LARGE_EXPERT
    return family == "skinny" or (_is_large(sizes) and sizes.rows >= FEWEST_GATED_ROWS)


def _is_large(sizes: Sizes) -> bool:
    return sizes.inputs >= LARGE_INPUTS and sizes.outputs >= LARGE_OUTPUTS


def packs_well(rows: int, capability: tuple[int, int]) -> bool:
    """Whether one product over packed weights is faster than several of one input."""
    return capability == H200 and rows > MOST_SKINNY_ROWS


def trains(sizes: Sizes, capability: tuple[int, int]) -> bool:
    """Whether both passes of a gated MLP are faster than what Inductor makes, each piece by its kernel."""
    return capability == H200 and _is_large(sizes) and sizes.rows >= FEWEST_TRAINED_ROWS
