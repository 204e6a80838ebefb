"""Which kernel of attention is taken without a measurement.

Everything rests on what was measured (benchmarks/results/nvidia-h200/attention_*.jsonl).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infuse.lowering.heuristics import H200

_QUERIES = range(2, 17)
_FEWEST_KEYS = 2048
_DECODED_HEAD_DIM = 128
_HEAD_DIMS = (64, 128)
_FEWEST_ROWS = 1024  # of queries, and of keys


@dataclass(frozen=True, slots=True)
class Site:
    """What decides. q: [B, H, S, D], k: [B, H_kv, T, D]; sizes may be symbolic.

    mask: its dtype, None without one. only_formula: a softcap or sinks, which torch's kernels do not compute.
    """

    q: Sequence[object]
    k: Sequence[object]
    mask: torch.dtype | None
    is_causal: bool
    only_formula: bool
    has_dropout: bool = False


def inference(site: Site, capability: tuple[int, int]) -> str:
    """The label of the kernel, "" where torch's own is as fast or nothing is known."""
    if decodes_well(site.q, site.k, capability):
        return "decode_-1"
    return "forward_-1" if _has_many_rows(site, capability) and _mask_is_no_bias(site) else ""


def trains(site: Site, capability: tuple[int, int]) -> bool:
    """Whether both passes of training run in Infuse's kernels. With dropout those are torch's, unless it has none."""
    if site.has_dropout and not site.only_formula:
        return False
    return _has_many_rows(site, capability) and _mask_is_no_bias(site)


def _has_many_rows(site: Site, capability: tuple[int, int]) -> bool:
    (*_, queries, head_dim), keys = site.q, site.k[2]
    if capability != H200 or head_dim not in _HEAD_DIMS:
        return False
    return isinstance(queries, int) and isinstance(keys, int) and min(queries, keys) >= _FEWEST_ROWS


def _mask_is_no_bias(site: Site) -> bool:
    """Not behind numbers that are added to every score: cuDNN reads those faster. A bool mask hides something."""
    return site.mask in (None, torch.bool) or site.only_formula


def decodes_well(q: Sequence[object], k: Sequence[object], capability: tuple[int, int]) -> bool:
    """Whether the kernel for few query rows is taken.

    Not for one query, where torch's kernels read a full cache faster, but for several of heads that share K and V,
    which torch's kernels then read several times.
    """
    _, heads, queries, head_dim = q
    _, kv_heads, keys, _ = k
    if capability != H200 or head_dim != _DECODED_HEAD_DIM or queries not in _QUERIES or heads == kv_heads:
        return False
    return isinstance(keys, int) and keys >= _FEWEST_KEYS
