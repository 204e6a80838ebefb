"""Rotary position embedding of one tensor (Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864).

    y = x * cos + rotate(x) * sin                    cos and sin [..., R]: a factor for each element
    y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin       with per_pair, cos and sin [..., R / 2]

x1 and x2 are the elements of R / 2 pairs: the halves of the first R elements of a row or, interleaved, those at even
and odd positions. rotate(x) has -x2 where x has x1, and x1 where it has x2. The elements behind the first R are passed
through. inverse: minus sin, which turns the other way.

Shapes: x, y [..., D]; cos, sin broadcast to x in all dimensions but the last, which is R or R / 2, R even, R <= D.
Dtypes: x, cos, sin any float; computed in the promoted one of the three (upcast: in float32 if that is narrower), every
operation rounded to it; y has x's dtype. y is dense, its dimensions in the memory order of x's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse.ops import checks, library, rope_kernels
from infuse.ops.registration import (
    Placements,
    implement,
    register,
    register_differentiable,
    register_sharding,
    with_defaults,
)

FLAGS = "bool interleaved=False, bool per_pair=False, bool inverse=False, bool upcast=False"
ARGUMENTS = f"Tensor x, Tensor cos, Tensor sin, {FLAGS}"
_BWD_FLAGS = FLAGS.replace("=False", "")


def compute_dtype(x: torch.dtype, cos: torch.dtype, sin: torch.dtype, upcast: bool) -> torch.dtype:
    """The dtype of the products and of their sum."""
    dtype = torch.promote_types(torch.promote_types(x, cos), sin)
    return torch.promote_types(dtype, torch.float32) if upcast else dtype


def rotary_dim(cos: Tensor, per_pair: bool) -> int:
    """R, how many elements of a row are rotated."""
    return cos.shape[-1] * (2 if per_pair else 1)


def _check(op: str, x: Tensor, cos: Tensor, sin: Tensor, per_pair: bool) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        checks.floating(op, name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"infuse::{op}: {name}: got a scalar, expected at least one dimension [..., D]")
    checks.equal(op, "sin: size of the last dimension", sin.shape[-1], cos.shape[-1])
    rotary = rotary_dim(cos, per_pair)
    if rotary % 2 != 0 or rotary > x.shape[-1]:
        raise ValueError(
            f"infuse::{op}: cos: got {rotary} elements to rotate, expected an even number of at most {x.shape[-1]}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() > x.dim():
            raise ValueError(f"infuse::{op}: {name}: got {table.dim()} dimensions, expected at most x's {x.dim()}")
        for dim in range(2, table.dim() + 1):
            if table.shape[-dim] != 1:
                checks.equal(op, f"{name}: size of dimension {-dim}", table.shape[-dim], x.shape[-dim])


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Slices and selections, whose gradients Inductor adds up in one kernel; those of a chunk are joined in memory."""
    if not interleaved:
        return _halves(x)
    pairs = x.unflatten(-1, (-1, 2))
    return pairs[..., 0], pairs[..., 1]


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (x1, x2) of the last dimension turned by 90 degrees: (-x2, x1)."""
    # Not `_pairs`: the gradient of strided slices vectorises, that of selections does not.
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else _halves(x)
    if interleaved:
        return torch.stack((-second, first), dim=-1).flatten(-2)
    return torch.cat((-second, first), dim=-1)


def _rotated(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, inverse: bool, out: torch.dtype
) -> list[Tensor]:
    """The rotation of x [..., R] in the dtype that torch promotes to, cast to `out`: parts to be joined."""
    if per_pair:
        tables = (cos, cos, sin, sin)
    elif interleaved or x.device.type != "cpu":
        # In this order: it is also the one in which autograd adds up, and thereby decides on the gradient's strides.
        straight = x * cos
        turned = rotate(x, interleaved) * sin
        return [(straight - turned if inverse else straight + turned).to(out)]
    else:
        # The same numbers: on a CPU Inductor writes what is joined to memory, and here that is the result itself.
        tables = (*_halves(cos), *_halves(sin))
    (first, second), (cos1, cos2, sin1, sin2) = _pairs(x, interleaved), tables
    if inverse:
        parts = [(first * cos1 + second * sin1).to(out), (second * cos2 - first * sin2).to(out)]
    else:
        parts = [(first * cos1 - second * sin1).to(out), (second * cos2 + first * sin2).to(out)]
    return [torch.stack(parts, dim=-1).flatten(-2)] if interleaved else parts


def rope_ref(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    per_pair: bool = False,
    inverse: bool = False,
    upcast: bool = False,
) -> Tensor:
    """The formula in plain torch: test oracle, decomposition and fallback. Returns y [..., D]."""
    _check("rope", x, cos, sin, per_pair)
    dtype = compute_dtype(x.dtype, cos.dtype, sin.dtype, upcast)
    rotary = rotary_dim(cos, per_pair)
    whole = rotary == x.shape[-1]
    head = x if whole else x[..., :rotary]
    parts = _rotated(head.to(dtype), cos, sin, interleaved, per_pair, inverse, x.dtype)
    parts += [] if whole else [x[..., rotary:]]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rope_bwd_ref(
    dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, inverse: bool, upcast: bool
) -> Tensor:
    """dx [..., D] in dy's dtype: dy turned back, computed in float32 (float64 for float64)."""
    _check("rope_bwd", dy, cos, sin, per_pair)
    dtype = _wide(compute_dtype(dy.dtype, cos.dtype, sin.dtype, upcast))
    rotary = rotary_dim(cos, per_pair)
    head = dy[..., :rotary].to(dtype)
    if per_pair:
        parts = _rotated(head, cos.to(dtype), sin.to(dtype), interleaved, True, not inverse, dy.dtype)
    else:
        # The transpose of rotate is its negative; sin may differ within a pair and goes first.
        turned = rotate(head * sin.to(dtype), interleaved)
        straight = head * cos.to(dtype)
        parts = [(straight + turned if inverse else straight - turned).to(dy.dtype)]
    return torch.cat((*parts, dy[..., rotary:]), dim=-1)


def rope_tables_bwd_ref(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, inverse: bool, upcast: bool
) -> tuple[Tensor, Tensor]:
    """dcos and dsin, in the shapes and dtypes of cos and sin, computed in float32 (float64 for float64)."""
    _check("rope_tables_bwd", x, cos, sin, per_pair)
    checks.same_shape("rope_tables_bwd", x=x, dy=dy)
    dtype = _wide(compute_dtype(x.dtype, cos.dtype, sin.dtype, upcast))
    rotary = rotary_dim(cos, per_pair)
    head, g = x[..., :rotary].to(dtype), dy[..., :rotary].to(dtype)
    if per_pair:
        (first, second), (d1, d2) = _pairs(head, interleaved), _pairs(g, interleaved)
        dcos, dsin = d1 * first + d2 * second, d2 * first - d1 * second
    else:
        dcos, dsin = g * head, g * rotate(head, interleaved)
    dsin = -dsin if inverse else dsin
    return dcos.sum_to_size(cos.shape).to(cos.dtype), dsin.sum_to_size(sin.shape).to(sin.dtype)


def rope_fake(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, per_pair: bool = False, *flags: bool
) -> Tensor:
    _check("rope", x, cos, sin, per_pair)
    return torch.empty_like(x)


def rope_bwd_fake(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, *flags: bool) -> Tensor:
    _check("rope_bwd", dy, cos, sin, per_pair)
    return torch.empty_like(dy)


def rope_tables_bwd_fake(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, per_pair: bool, *flags: bool
) -> tuple[Tensor, Tensor]:
    _check("rope_tables_bwd", x, cos, sin, per_pair)
    return cos.new_empty(cos.shape), sin.new_empty(sin.shape)


class _Rope(torch.autograd.Function):
    """x is saved only for gradients of the tables, which models rarely ask for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, *flags: bool) -> Tensor:
        ctx.save_for_backward(x if cos.requires_grad or sin.requires_grad else None, cos, sin)
        ctx.flags = flags
        return torch.ops.infuse.rope(x, cos, sin, *flags)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin = ctx.saved_tensors
        # The formulas are linear in dy and x, and differentiable as they stand (for create_graph=True).
        again = torch.is_grad_enabled()
        wants_dx, wants_dcos, wants_dsin = ctx.needs_input_grad[:3]
        dx = dcos = dsin = None
        if wants_dx:
            dx = (rope_bwd_ref if again else torch.ops.infuse.rope_bwd)(dy, cos, sin, *ctx.flags)
        if x is not None:
            tables = rope_tables_bwd_ref if again else torch.ops.infuse.rope_tables_bwd
            dcos, dsin = tables(dy, x, cos, sin, *ctx.flags)
        return dx, dcos if wants_dcos else None, dsin if wants_dsin else None, *(None for _ in ctx.flags)


def _implementation(x: Tensor, cos: Tensor, sin: Tensor, *flags: bool) -> Tensor:
    return torch.empty_like(x).copy_(rope_ref(x, cos, sin, *flags))


def _bwd_implementation(dy: Tensor, cos: Tensor, sin: Tensor, *flags: bool) -> Tensor:
    return torch.empty_like(dy).copy_(rope_bwd_ref(dy, cos, sin, *flags))


def _cuda(x: Tensor, cos: Tensor, sin: Tensor, *flags: bool) -> Tensor:
    _check("rope", x, cos, sin, flags[1])
    return _kernel(x, cos, sin, *flags, is_backward=False)


def _bwd_cuda(dy: Tensor, cos: Tensor, sin: Tensor, *flags: bool) -> Tensor:
    _check("rope_bwd", dy, cos, sin, flags[1])
    return _kernel(dy, cos, sin, *flags, is_backward=True)


def _kernel(x: Tensor, cos: Tensor, sin: Tensor, *flags: bool, is_backward: bool) -> Tensor:
    """The CUDA kernel's result, the formula's where there is none."""
    if library.missing(x.device) or rope_kernels.can_rotate(x, cos, sin):
        return (_bwd_implementation if is_backward else _implementation)(x, cos, sin, *flags)
    y = torch.empty_like(x)
    norm = (None, None, None, 0.0, False)
    torch.ops.infuse.rope_out(x, None, cos, sin, *norm, *flags, is_backward, -1, y, None)
    return y


def _tables_bwd_implementation(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *flags: bool) -> tuple[Tensor, Tensor]:
    dcos, dsin = rope_tables_bwd_ref(dy, x, cos, sin, *flags)
    return dcos.contiguous(), dsin.contiguous()


def _table_placement(x: Any, table: Any, dim: int) -> Any:
    """Where a table must be for x sharded on `dim`: sharded alike, whole where it is broadcast."""
    from torch.distributed.tensor import Replicate, Shard

    own = dim - (len(x.shape) - len(table.shape))
    return Shard(own) if own >= 0 and table.shape[own] != 1 else Replicate()


def _sharding(x: Any, cos: Any, sin: Any, *flags: Any) -> Placements:
    """Any dimension but the last."""
    from torch.distributed.tensor import Replicate, Shard

    rest = [None for _ in flags]
    rules: list[tuple[list[Any], list[Any]]] = [([Replicate()], [Replicate(), Replicate(), Replicate(), *rest])]
    for dim in range(len(x.shape) - 1):
        tables = [_table_placement(x, table, dim) for table in (cos, sin)]
        rules.append(([Shard(dim)], [Shard(dim), *tables, *rest]))
    return rules


def _tables_bwd_sharding(dy: Any, x: Any, cos: Any, sin: Any, *flags: Any) -> Placements:
    """Tables that are whole get partial sums."""
    from torch.distributed.tensor import Partial, Replicate

    rules: list[tuple[list[Any], list[Any]]] = []
    for (_, inputs), first in ((rule, i == 0) for i, rule in enumerate(_sharding(x, cos, sin, *flags))):
        outputs = [Partial() if place == Replicate() and not first else place for place in inputs[1:3]]
        rules.append((outputs, [inputs[0], *inputs]))
    return rules


register_differentiable(
    "rope",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=rope_ref,
    fake=rope_fake,
    autograd=_Rope.apply,
)
register(
    "rope_bwd",
    f"Tensor dy, Tensor cos, Tensor sin, {_BWD_FLAGS}",
    "Tensor",
    implementation=_bwd_implementation,
    fake=rope_bwd_fake,
)
register(
    "rope_tables_bwd",
    f"Tensor dy, Tensor x, Tensor cos, Tensor sin, {_BWD_FLAGS}",
    "(Tensor, Tensor)",
    implementation=_tables_bwd_implementation,
    fake=rope_tables_bwd_fake,
)
implement("rope", with_defaults(torch.ops.infuse.rope.default, _cuda), "CUDA")
implement("rope_bwd", _bwd_cuda, "CUDA")
register_sharding("rope", _sharding)
register_sharding("rope_bwd", _sharding)
register_sharding("rope_tables_bwd", _tables_bwd_sharding)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    per_pair: bool = False,
    inverse: bool = False,
    upcast: bool = False,
) -> Tensor:
    """The rotary embedding of x [..., D] by the angles whose cos and sin are given; see the module's text.

    Raises TypeError for a dtype that is not a float, ValueError for cos and sin that do not fit each other or x.
    """
    _check("rope", x, cos, sin, per_pair)
    return torch.ops.infuse.rope(x, cos, sin, interleaved, per_pair, inverse, upcast)  # type: ignore[no-any-return]
