"""The gradients of infuse.ops.qk_norm_rope without LayerNorm, of q and k by themselves or both in one launch.

    g = rotation^T(dy)
    dx = rstd * (g * w - n * mean(g * w * n)), n = x * rstd, w = weight_offset + weight
    dweight = sum over rows of g * n

Shapes: dy, x, dx [..., D]; weight, dweight [D], dweight empty [0] without a weight; cos, sin as in infuse.ops.rope. dx
has x's strides where x is dense, and its memory order elsewhere. What is saved is x, which lives anyway: rstd is
computed again from the row that is being read. The kernel rounds nothing but the results and adds up in a fixed order:
the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops import checks, library, rope_kernels
from infuse.ops.registration import define, implement, register
from infuse.ops.rms_norm import normalise, rms_norm_bwd_ref, statistics_dtype
from infuse.ops.rope import FLAGS, rope_bwd_ref

_NUMBERS = f"float eps, float weight_offset, bool cast_before_weight, {FLAGS.replace('=False', '')}"
_LANES = 32  # that hold a row, two vectors each
_VECTOR_BYTES = 16


def qk_norm_rope_bwd_ref(
    dy: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    *flags: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dweight in plain torch."""
    checks.same_shape("qk_norm_rope_bwd", x=x, dy=dy)
    g = rope_bwd_ref(dy.to(statistics_dtype(x)), cos, sin, *flags)
    rstd = normalise(x, eps)[1].squeeze(-1)
    return rms_norm_bwd_ref(g, x, weight, rstd, weight_offset, cast_before_weight)


def _of_each(
    dy: Tensor,
    x: Tensor,
    other_dy: Tensor,
    other: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    other_weight: Tensor | None,
    *rest: Any,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of a pair as those of its two rotations."""
    return (dy, x, cos, sin, weight, *rest), (other_dy, other, cos, sin, other_weight, *rest)


def qk_norm_rope_pair_bwd_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight and those of the other tensor."""
    mine, others = _of_each(*args)
    return *qk_norm_rope_bwd_ref(*mine), *qk_norm_rope_bwd_ref(*others)


def can_run(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, per_pair: bool, dy: Tensor | None = None
) -> str:
    """Why the CUDA kernel cannot take these arguments, "" when it can. Reads shapes, strides and dtypes only."""
    reason = rope_kernels.can_rotate(x, cos, sin) or rope_kernels.can_normalise(x, weight, False)
    if reason:
        return reason
    if cos.dtype != sin.dtype or cos.dtype not in (x.dtype, torch.float32):
        return f"no backward kernel for factors in {cos.dtype} and {sin.dtype} beside x in {x.dtype}"
    if dy is not None and (dy.dtype != x.dtype or not rope_kernels.has_adjacent_elements(dy)):
        return f"no backward kernel for a gradient in {dy.dtype} of strides {tuple(dy.stride())}"
    return _why_no_vectors(x.shape[-1], cos.shape[-1], per_pair, _VECTOR_BYTES // x.itemsize)


def _why_no_vectors(dim: object, factors: object, per_pair: bool, elements: int) -> str:
    """Why lanes of one warp cannot hold a row in vectors of so many elements, "" when they can."""
    if not isinstance(dim, int) or not isinstance(factors, int):
        return "no backward kernel for a symbolic size of a head"
    if dim % elements or factors % (elements if per_pair else 2 * elements) or dim > 2 * _LANES * elements:
        return f"no backward kernel for {factors} factors of {dim} elements"
    return ""


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row starts where a vector may; asked when the kernel is about to run."""
    steps = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    places = [tensor.data_ptr(), *(step * tensor.itemsize for step in steps)]
    return all(place % _VECTOR_BYTES == 0 for place in places)


def _gradients(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _by_formula(x: Tensor, weight: Tensor | None, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula's results as the fake lays them out."""
    dx, dweight = _gradients(x, weight)
    return dx.copy_(found[0]), dweight.copy_(found[1])


def _fake(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    checks.same_shape("qk_norm_rope_bwd", x=x, dy=dy)
    return _gradients(x, weight)


def _pair_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mine, others = _of_each(*args)
    return *_fake(*mine), *_fake(*others)


def _implementation(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _by_formula(x, weight, qk_norm_rope_bwd_ref(dy, x, cos, sin, weight, *rest))


def _pair_implementation(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mine, others = _of_each(*args)
    return *_implementation(*mine), *_implementation(*others)


def _takes(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, per_pair: bool) -> bool:
    """Whether the kernel can run on these very tensors. A table of cos and sin side by side is read as it lies."""
    if library.missing(x.device) or can_run(x, cos, sin, weight, per_pair, dy) or not x.numel():
        return False
    together = per_pair and cos.stride(-1) == 2 and sin.data_ptr() == cos.data_ptr() + cos.itemsize
    tables = [cos] if together else [cos, sin]
    if any(table.stride(-1) != (2 if together else 1) for table in tables):
        return False
    return all(_is_aligned(tensor) for tensor in (dy, x, *tables, *([] if weight is None else [weight])))


def _cuda(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, offset: float, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, *flags = rest
    if not _takes(dy, x, cos, sin, weight, flags[1]):
        return _implementation(dy, x, cos, sin, weight, eps, offset, *rest)
    dx, dweight = _gradients(x, weight)
    written = None if weight is None else dweight
    torch.ops.infuse.qk_norm_rope_bwd_out(
        *(dy, x, None, None, cos, sin, weight, None, eps, offset, *flags, dx, None, written, None)
    )
    return dx, dweight


def _pair_cuda(
    dy: Tensor,
    x: Tensor,
    other_dy: Tensor,
    other: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    other_weight: Tensor | None,
    eps: float,
    offset: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, *flags = rest
    same = (weight is None) == (other_weight is None) and (
        weight is None or other_weight is None or weight.dtype == other_weight.dtype
    )
    takes = _takes(dy, x, cos, sin, weight, flags[1]) and _takes(other_dy, other, cos, sin, other_weight, flags[1])
    if not (same and takes):
        tensors = (dy, x, other_dy, other, cos, sin, weight, other_weight)
        return _pair_implementation(*tensors, eps, offset, *rest)
    (dx, dweight), (other_dx, other_dweight) = _gradients(x, weight), _gradients(other, other_weight)
    written = (None, None) if weight is None else (dweight, other_dweight)
    torch.ops.infuse.qk_norm_rope_bwd_out(
        *(dy, x, other_dy, other, cos, sin, weight, other_weight, eps, offset, *flags, dx, other_dx, *written)
    )
    return dx, dweight, other_dx, other_dweight


register(
    "qk_norm_rope_bwd",
    f"Tensor dy, Tensor x, Tensor cos, Tensor sin, Tensor? weight, {_NUMBERS}",
    "(Tensor, Tensor)",
    implementation=_implementation,
    fake=_fake,
)
register(
    "qk_norm_rope_pair_bwd",
    "Tensor dy, Tensor x, Tensor other_dy, Tensor other, Tensor cos, Tensor sin, Tensor? weight, Tensor? other_weight, "
    + _NUMBERS,
    "(Tensor, Tensor, Tensor, Tensor)",
    implementation=_pair_implementation,
    fake=_pair_fake,
)
# Implemented by csrc/rope for CUDA alone.
define(
    "qk_norm_rope_bwd_out(Tensor dy, Tensor x, Tensor? other_dy, Tensor? other, Tensor cos, Tensor sin, "
    f"Tensor? weight, Tensor? other_weight, float eps, float weight_offset, {FLAGS.replace('=False', '')}, "
    "Tensor(a!) dx, Tensor(b!)? other_dx, Tensor(c!)? dweight, Tensor(d!)? other_dweight) -> ()"
)
implement("qk_norm_rope_bwd", _cuda, "CUDA")
implement("qk_norm_rope_pair_bwd", _pair_cuda, "CUDA")
