"""Rotary embedding of q and k, each head normalised before if it is to be, and the write of k and v into a cache.

    k_cache[:, :, k_positions] = rope(rms_norm(k));  v_cache[:, :, v_positions] = v;  returns rope(rms_norm(q))

Shapes: q [batch, heads, seq_len, D]; k, v [batch, kv_heads, seq_len, D]; caches [batch, kv_heads, cache_len, D];
positions [seq_len], int64 or int32, an index as torch's (negative: from the end); cos, sin as in infuse.ops.rope, those
of q and of k by themselves, because models look them up twice; weights [D] or None; eps None: no norm. q, k, v and the
caches have one dtype. The parts round as infuse.ops.rms_norm and rope do. Inference only.

Aliasing: the caches are written in place and nothing that is returned shares their memory; q's result is a tensor of
its own. To be functionalised the operator is written as two things: an allocation of the result, and
`rope_cache_write_out`, which returns nothing and writes to three arguments. AOTAutograd wraps that one in
`auto_functionalized_v2` with the caches and the result as bases, reads behind it see its outputs, and Inductor puts the
bases back in place of the outputs where nobody reads the old values any more, which for a cache that is an input of
the graph, is written by `copy_` at the end and was not saved by anybody, is always. So no cache is copied, and layers
that own a cache each do not see one another. The caches must not share memory with each other or with q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from infuse.ops import checks, rope_kernels
from infuse.ops.registration import define, implement
from infuse.ops.rms_norm import rms_norm_ref
from infuse.ops.rope import FLAGS as ROPE_FLAGS
from infuse.ops.rope import rope_ref

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor q_cos, Tensor q_sin, Tensor k_cos, Tensor k_sin"
_CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache"
_NUMBERS = (
    "Tensor k_positions, Tensor v_positions, Tensor? q_weight, Tensor? k_weight, float? eps, float weight_offset, "
    f"bool cast_before_weight, {ROPE_FLAGS.replace('=False', '')}"
)
Caches = Sequence[Tensor]


def _check(q: Tensor, k: Tensor, v: Tensor, caches: Caches, positions: Sequence[Tensor]) -> None:
    op = "rope_cache_write"
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_cache", caches[0]), ("v_cache", caches[1])):
        checks.rank(op, name, tensor, 4, "[batch, heads, seq_len, D]")
    checks.same_dtype(op, q=q, k=k, v=v, k_cache=caches[0], v_cache=caches[1])
    for name, tensor in (("k", k), ("v", v)):
        checks.equal(op, f"{name}: seq_len", tensor.shape[2], q.shape[2])
    for name, cache, tensor in (("k_cache", caches[0], k), ("v_cache", caches[1], v)):
        for dim in (0, 1, 3):
            checks.equal(op, f"{name}: size of dimension {dim}", cache.shape[dim], tensor.shape[dim])
    for name, indices in zip(("k_positions", "v_positions"), positions):
        checks.rank(op, name, indices, 1, "[seq_len]")
        checks.equal(op, f"{name}: size", indices.shape[0], q.shape[2])
        if indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"infuse::{op}: {name}: got dtype {indices.dtype}, expected torch.int64 or torch.int32")


def _formula(rms_norm: Callable[..., Tensor], rope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula out of its parts."""

    def rope_cache_write(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_cos: Tensor,
        q_sin: Tensor,
        k_cos: Tensor,
        k_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k_positions: Tensor,
        v_positions: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float | None,
        weight_offset: float,
        cast_before_weight: bool,
        *flags: bool,
    ) -> Tensor:
        _check(q, k, v, (k_cache, v_cache), (k_positions, v_positions))
        if eps is not None:
            q = rms_norm(q, q_weight, eps, weight_offset, cast_before_weight)
            k = rms_norm(k, k_weight, eps, weight_offset, cast_before_weight)
        k_cache[:, :, k_positions] = rope(k, k_cos, k_sin, *flags)
        v_cache[:, :, v_positions] = v
        return rope(q, q_cos, q_sin, *flags)

    return rope_cache_write


rope_cache_write_ref = _formula(rms_norm_ref, rope_ref)


def can_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor,
    k_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_positions: Tensor,
    v_positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: object,
    weight_offset: float,
    cast_before_weight: bool,
    *flags: bool,
) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can. Reads shapes, strides and dtypes only."""
    if not isinstance(eps, (float, type(None))) or not isinstance(weight_offset, (int, float)):
        return "eps is symbolic"
    for positions in (k_positions, v_positions):
        if positions.device != q.device:
            return f"no kernel for positions on {positions.device}"
    if q_cos.dtype != k_cos.dtype or q_sin.dtype != k_sin.dtype:
        return "no kernel for q's and k's tables in different dtypes"
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        return "no kernel for q's and k's weights in different dtypes"
    for x, cos, sin, weight in ((q, q_cos, q_sin, q_weight), (k, k_cos, k_sin, k_weight)):
        reason = rope_kernels.can_rotate(x, cos, sin) or rope_kernels.can_normalise(x, weight, cast_before_weight)
        if reason:
            return reason
        if not all(rope_kernels.is_shared(table, x, 1) for table in (cos, sin)):
            return "no kernel for factors of each head"
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not rope_kernels.has_adjacent_elements(tensor):
            return f"no kernel for {name} with a last dimension of stride {tensor.stride(-1)}"
    return ""


def _out_implementation(*args: Any) -> None:
    """rope_cache_write_out by the formula."""
    *arguments, config, k_cache, v_cache, out = args
    del config
    out.copy_(rope_cache_write_ref(*arguments[:7], k_cache, v_cache, *arguments[7:]))


def _default(*args: Any) -> Tensor:
    """The result's allocation and one call that writes; the formula where that cannot be."""
    if rope_kernels.missing(args[0]) or can_run(*args):
        return rope_cache_write_ref(*args)
    _check(args[0], args[1], args[2], args[7:9], args[9:11])
    out = torch.empty_like(args[0])
    torch.ops.infuse.rope_cache_write_out(*args[:7], *args[9:], -1, *args[7:9], out)
    return out


implement("rope_cache_write_out", _out_implementation, "CompositeExplicitAutograd")
for _overload, _function in (
    ("", _default),
    (".inline", rope_cache_write_ref),
    (".parts", _formula(torch.ops.infuse.rms_norm, torch.ops.infuse.rope)),
):
    define(f"rope_cache_write{_overload}({_TENSORS}, {_CACHES}, {_NUMBERS}) -> Tensor")
    implement(f"rope_cache_write{_overload}", _function, "CompositeImplicitAutograd")
