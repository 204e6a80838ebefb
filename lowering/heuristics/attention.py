"""Which kernel of attention is taken without a measurement.

Everything rests on what was measured (benchmarks/results/nvidia-h200/attention_*.jsonl).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infuse.lowering.heuristics import H200

_HEAD_DIM = 128
_QUERIES = range(2, 17)
_FEWEST_KEYS = 2048


@dataclass(frozen=True, slots=True)
class Site:
    """q: [B, H, S, D], k: [B, H_kv, T, D]; sizes may be symbolic. only_formula: a softcap or sinks, which torch's
    kernels do not compute."""

    q: Sequence[object]
    k: Sequence[object]
    has_mask: bool
    is_causal: bool
    only_formula: bool
    has_dropout: bool = False


def inference(site: Site, capability: tuple[int, int]) -> str:
    """The label of the kernel, "" where torch's own is as fast or nothing is known."""
    if decodes_well(site.q, site.k, capability):
        return "decode_-1"
    return "forward_-1" if _forwards_well(site, capability) else ""


def trains(site: Site, capability: tuple[int, int]) -> bool:
    """Whether both passes of training run in Infuse's kernels."""
    return False


def _forwards_well(site: Site, capability: tuple[int, int]) -> bool:
    return False


def decodes_well(q: Sequence[object], k: Sequence[object], capability: tuple[int, int]) -> bool:
    """Whether the kernel for few query rows is taken.

    Not for one query, where torch's kernels read a full cache faster, but for several of heads that share K and V,
    which torch's kernels then read several times.
    """
    _, heads, queries, head_dim = q
    _, kv_heads, keys, _ = k
    if capability != H200 or head_dim != _HEAD_DIM or queries not in _QUERIES or heads == kv_heads:
        return False
    return isinstance(keys, int) and keys >= _FEWEST_KEYS
