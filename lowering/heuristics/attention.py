"""When the kernel for few query rows is taken without a measurement."""

from __future__ import annotations

from infuse.lowering.heuristics import H200


def decodes_well(queries: int, capability: tuple[int, int]) -> bool:
    """Whether the kernel is taken without a measurement: not for one query, where torch's kernels read a full cache
    faster, but for several, for which they read K and V several times
    (benchmarks/results/nvidia-h200/attention_decode.jsonl).
    """
    return capability == H200 and queries > 1
