"""When the kernel for few query rows is taken without a measurement."""

from __future__ import annotations

from collections.abc import Sequence

from infuse.lowering.heuristics import H200

# What was measured (benchmarks/results/nvidia-h200/attention_decode.jsonl).
_HEAD_DIM = 128
_QUERIES = range(2, 17)
_FEWEST_KEYS = 2048


def decodes_well(q: Sequence[object], k: Sequence[object], capability: tuple[int, int]) -> bool:
    """Whether the kernel is taken without a measurement. q: [B, H, S, D], k: [B, H_kv, T, D]; sizes may be symbolic.

    Not for one query, where torch's kernels read a full cache faster, but for several of heads that share K and V,
    which torch's kernels then read several times.
    """
    _, heads, queries, head_dim = q
    _, kv_heads, keys, _ = k
    if capability != H200 or head_dim != _HEAD_DIM or queries not in _QUERIES or heads == kv_heads:
        return False
    return isinstance(keys, int) and keys >= _FEWEST_KEYS
