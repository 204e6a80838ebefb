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
_DECODED_HEAD_DIM = 128  # of several queries
_HEAD_DIMS = (64, 128)
_SMALL_HEAD_DIM = 64
# Of the backward's kernel: keys of a CTA, which goes through all heads that share them, and CTAs that fill the device.
_KEYS_OF_CTA = 128
_FEWEST_CTAS = 198  # 1.5 for each SM: those of a causal site differ in length, and the longest begin first
_LEAST = ((1024, 1024), (512, 16384))  # queries and keys


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
    if decodes_well(site, capability):
        return "decode_-1"
    return "forward_-1" if _has_many_rows(site, capability) and _mask_is_no_bias(site) else ""


def trains(site: Site, capability: tuple[int, int]) -> bool:
    """Whether both passes of training run in Infuse's kernels. With dropout those are torch's, unless it has none."""
    if (site.has_dropout and not site.only_formula) or _leaves_sms_idle(site):
        return False
    return _has_many_rows(site, capability) and _mask_is_no_bias(site)


def expands(site: Site, capability: tuple[int, int]) -> bool:
    """Whether training leaves shared K/V heads to torch's kernels, which are given K and V of each head.

    With 14 causal heads of 64 that share 2, 4,096 tokens, the backward's kernel took 2.5 times as long as cuDNN's for K
    and V of each head, which stock has in Qwen2.5 0.5B: a training step took 1.18 times as long as stock's, 1.08 times
    with cuDNN's backward for shared heads, and takes 0.99 times with that for each head.
    """
    shares = site.q[1] != site.k[1] and not site.has_dropout
    return shares and _has_many_rows(site, capability) and _leaves_sms_idle(site)


def _leaves_sms_idle(site: Site) -> bool:
    """Whether the backward's kernel has fewer CTAs than fill the device, and torch's fused kernels compute the same."""
    batch, kv_heads, keys, _ = site.k
    if not isinstance(batch, int) or not isinstance(kv_heads, int) or not isinstance(keys, int):
        return False
    is_open = site.mask is None and not site.only_formula
    return is_open and batch * kv_heads * -(-keys // _KEYS_OF_CTA) < _FEWEST_CTAS


def backward(site: Site) -> str:
    """The label of torch's operator that computes the gradients behind Infuse's forward pass, "" for Infuse's own.

    With small heads and every key open cuDNN's takes 0.81 of the time (16 x 16 heads of 64, 4,096 tokens, on an H200).
    """
    everything_open = site.mask is None and not site.is_causal and not site.only_formula
    return "sdpa_cudnn" if site.q[-1] == _SMALL_HEAD_DIM and everything_open else ""


def _has_many_rows(site: Site, capability: tuple[int, int]) -> bool:
    (*_, queries, head_dim), keys = site.q, site.k[2]
    if capability != H200 or head_dim not in _HEAD_DIMS:
        return False
    if not isinstance(queries, int) or not isinstance(keys, int):
        return False
    return any(queries >= fewest_queries and keys >= fewest_keys for fewest_queries, fewest_keys in _LEAST)


def _mask_is_no_bias(site: Site) -> bool:
    """Not behind numbers that are added to every score: cuDNN reads those faster. A bool mask hides something."""
    return site.mask in (None, torch.bool) or site.only_formula


def decodes_well(site: Site, capability: tuple[int, int]) -> bool:
    """Whether the kernel for few query rows is taken, always for heads that share K and V.

    For several queries, where torch's kernels read K and V once for each head, and for one behind a mask. Behind one,
    over caches of 4,096 keys that are half full, on an H200: 8 heads of 128 take 0.4 of the time of torch's kernels,
    which read all of it, in batches of 1 and 0.6 in those of 64; 2 heads of 64 take 0.4 to 0.5. Over full ones it is up
    to 1.09.
    """
    _, heads, queries, head_dim = site.q
    _, kv_heads, keys, _ = site.k
    if capability != H200 or heads == kv_heads or not isinstance(keys, int):
        return False
    if queries == 1:
        return head_dim in _HEAD_DIMS and site.mask is torch.bool and keys >= 1024
    return head_dim == _DECODED_HEAD_DIM and queries in _QUERIES and keys >= _FEWEST_KEYS
