"""The loss of a language model's head: a linear and the cross entropy over the vocabulary, without all logits at once.

    z    = x @ weight^T + bias                                  rounded to x's dtype, then widened if `float_logits`
    z    = softcap tanh(z / softcap)                            if softcap is not 0, as in Gemma 2
    nll  = (1 - s) (lse(z) - z_t) + s (lse(z) - mean(z))        s = label_smoothing, t = the row's target
    loss = sum of nll over the rows whose target is not ignore_index, for "mean" divided by their number

Shapes: x [..., D], weight [V, D], bias [V] or None, target int64 with as many elements as x has rows, in their order;
loss [], float32 with `float_logits`, else in x's dtype. With "mean" and no row left it is NaN, as torch's.

On CUDA rows are taken in chunks: a product of matrices makes the logits of some rows, the kernel of csrc/cross_entropy
their losses and, in the logits' own place, their gradient, and two more products the gradients of x and weight. So the
gradients are those of the forward, which the backward multiplies by that of the loss: nothing is computed twice, and
only one chunk of logits exists at a time. The weight's gradient is added up over the chunks in its own dtype.
(Chunks of rows with gradients in the forward: Hsu et al. 2024, arXiv:2410.10989; logits that are never in memory, at
the price of a fourth product: Wijmans et al. 2024, arXiv:2411.09009.) Everything after the first rounding of z is in
float32.

A checkpointed region that holds the loss computes the gradients twice: leave the head out of it.

Elsewhere the formula runs. A target that is neither in the vocabulary nor ignore_index is an error of torch's there;
the kernel gives NaN instead, in the loss and in all gradients that the row has a part in, and goes on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks, chunked_cross_entropy
from infuse.ops.registration import Placements, differentiate, register, register_differentiable, register_sharding

REDUCTIONS = ("mean", "sum")
ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100, str reduction='mean', "
    "float label_smoothing=0.0, bool float_logits=False, float softcap=0.0"
)
_FWD_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, str reduction, float label_smoothing, "
    "bool float_logits, float softcap, bool need_dx, bool need_dweight, bool need_dbias"
)
_HALF = (torch.float16, torch.bfloat16)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str) -> None:
    checks.floating(op, "x", x)
    checks.same_dtype(op, x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    checks.rank(op, "weight", weight, 2, "[V, D]")
    if x.dim() == 0:
        raise ValueError(f"infuse::{op}: x: got no dimension, expected [..., D]")
    checks.equal(op, "weight: size of dimension 1", weight.shape[1], x.shape[-1])
    if bias is not None:
        checks.rank(op, "bias", bias, 1, "[V]")
        checks.equal(op, "bias: size", bias.shape[0], weight.shape[0])
    if target.dtype != torch.int64:
        raise TypeError(f"infuse::{op}: target: got dtype {target.dtype}, expected torch.int64")
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    checks.equal(op, "target: number of elements", target.numel(), rows)
    if reduction not in REDUCTIONS:
        raise ValueError(f"infuse::{op}: reduction: got {reduction!r}, expected one of {list(REDUCTIONS)}")


def linear_cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    float_logits: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """The formula in plain torch, with all logits."""
    _check("linear_cross_entropy", x, weight, bias, target, reduction)
    logits = _capped(F.linear(x, weight, bias).reshape(-1, weight.shape[0]), softcap)
    if float_logits and logits.dtype in _HALF:
        logits = logits.float()
    return F.cross_entropy(
        logits,
        target.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return logits if softcap == 0.0 else torch.tanh(logits / softcap) * softcap


def _loss_dtype(x: Tensor, float_logits: bool) -> torch.dtype:
    return torch.float32 if float_logits and x.dtype in _HALF else x.dtype


def _implementation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    float_logits: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    flags = (ignore_index, reduction, label_smoothing, float_logits, softcap)
    if chunked_cross_entropy.cannot_run(x, weight, bias):
        return linear_cross_entropy_ref(x, weight, bias, target, *flags)
    return linear_cross_entropy_fwd_chunked(x, weight, bias, target, *flags, False, False, False)[0]


def linear_cross_entropy_fwd_chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    float_logits: bool,
    softcap: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("linear_cross_entropy_fwd", x, weight, bias, target, reduction)
    rows = x.reshape(-1, x.shape[-1])
    loss, dx, dweight, dbias = chunked_cross_entropy.run(
        rows, weight, bias, target.reshape(-1), ignore_index, reduction == "mean", label_smoothing, softcap, *needs
    )
    return loss.to(_loss_dtype(x, float_logits)), dx.view(x.shape) if needs[0] else dx, dweight, dbias


def linear_cross_entropy_fwd_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    float_logits: bool,
    softcap: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients that are needed, the others empty; those of the logits are rounded to x's dtype."""
    flags = (ignore_index, reduction, label_smoothing, float_logits, softcap)
    loss = linear_cross_entropy_ref(x, weight, bias, target, *flags)
    empty, vocab = x.new_empty(0), weight.shape[0]
    if not any(needs):
        return loss, empty, empty.clone(), empty.clone()
    target = target.reshape(-1, 1)
    kept = target != ignore_index
    logits = F.linear(x, weight, bias).reshape(-1, vocab)
    wide = _capped(logits.float() if x.dtype in _HALF else logits, softcap)
    slope = torch.softmax(wide, -1) - label_smoothing / vocab
    share = torch.full_like(target, label_smoothing - 1.0, dtype=slope.dtype)
    slope = slope.scatter_add(1, torch.where(kept, target, 0), share) * kept
    slope = slope if softcap == 0.0 else slope * (1.0 - (wide / softcap) ** 2)
    slope = (slope / kept.sum() if reduction == "mean" else slope).to(x.dtype)
    dx = (slope @ weight).view(x.shape) if needs[0] else empty
    dweight = slope.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else empty.clone()
    return loss, dx, dweight, slope.sum(0) if needs[2] else empty.clone()


def _fwd_implementation(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if chunked_cross_entropy.cannot_run(x, weight, bias):
        return linear_cross_entropy_fwd_ref(x, weight, bias, *rest)
    return linear_cross_entropy_fwd_chunked(x, weight, bias, *rest)


def linear_cross_entropy_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    float_logits: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    _check("linear_cross_entropy", x, weight, bias, target, reduction)
    return x.new_empty((), dtype=_loss_dtype(x, float_logits))


def linear_cross_entropy_fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *flags, need_dx, need_dweight, need_dbias = rest
    loss = linear_cross_entropy_fake(x, weight, bias, target, *flags)
    dbias = x.new_empty(bias.shape if need_dbias and bias is not None else 0)
    return (
        loss,
        x.new_empty(x.shape if need_dx else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
        dbias,
    )


def linear_cross_entropy_bwd_ref(
    dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for that of the loss, []; those that were not wanted stay empty."""
    dx, dweight, dbias = ((grad * dloss).to(grad.dtype) for grad in (dx, dweight, dbias))
    return dx, dweight, dbias


def linear_cross_entropy_bwd_fake(
    dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return dx.new_empty(dx.shape), dweight.new_empty(dweight.shape), dbias.new_empty(dbias.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *flags: Any) -> Tensor:
        needs = (*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2])
        loss, *grads = torch.ops.infuse.linear_cross_entropy_fwd(x, weight, bias, target, *flags, *needs)
        ctx.save_for_backward(x, weight, bias, target, *grads)
        ctx.flags, ctx.needs = flags, needs
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        inputs, grads = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        if torch.is_grad_enabled():
            return differentiate(linear_cross_entropy_ref, (*inputs, *ctx.flags), (dloss,))
        grads = torch.ops.infuse.linear_cross_entropy_bwd(dloss, *grads)
        wanted = (grad if need else None for grad, need in zip(grads, ctx.needs))
        return *wanted, None, *(None for _ in ctx.flags)


def _rows_over_devices(x: Any, target: Any, reduction: str) -> list[Any]:
    """How x and target may be sharded alike: a sum is the sum of the shards' sums, a mean is not their mean."""
    from torch.distributed.tensor import Replicate, Shard

    same = tuple(x.shape[:-1]) == tuple(target.shape)
    return [Replicate(), *(Shard(dim) for dim in range(len(target.shape)) if same and reduction == "sum")]


def _partial(rows: Any) -> Any:
    from torch.distributed.tensor import Partial, Replicate

    return Replicate() if rows.is_replicate() else Partial()


def _sharding(x: Any, weight: Any, bias: Any, target: Any, ignore_index: int, reduction: str, *rest: Any) -> Placements:
    """By rows, for a sum; the weight is whole everywhere."""
    from torch.distributed.tensor import Replicate

    bias_place = None if bias is None else Replicate()
    flags = [None] * (2 + len(rest))
    return [
        ([_partial(rows)], [rows, Replicate(), bias_place, rows, *flags])
        for rows in _rows_over_devices(x, target, reduction)
    ]


def _fwd_sharding(
    x: Any, weight: Any, bias: Any, target: Any, ignore_index: int, reduction: str, *rest: Any
) -> Placements:
    return [
        ([*loss, inputs[0] if rest[-3] else inputs[1], *loss, *loss], inputs)
        for loss, inputs in _sharding(x, weight, bias, target, ignore_index, reduction, *rest)
    ]


def _bwd_sharding(dloss: Any, dx: Any, dweight: Any, dbias: Any) -> Placements:
    """Each gradient as it is; those of weight and bias may be partial sums, which a factor does not change."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()
    rows = [Shard(dim) for dim in range(len(dx.shape) - 1)]
    return [
        ([whole, whole, whole], [whole, whole, whole, whole]),
        *(([row, Partial(), Partial()], [whole, row, Partial(), Partial()]) for row in rows),
    ]


register_differentiable(
    "linear_cross_entropy",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=linear_cross_entropy_ref,
    fake=linear_cross_entropy_fake,
    autograd=_LinearCrossEntropy.apply,
)
register(
    "linear_cross_entropy_fwd",
    _FWD_ARGUMENTS,
    "(Tensor, Tensor, Tensor, Tensor)",
    implementation=_fwd_implementation,
    fake=linear_cross_entropy_fwd_fake,
)
register(
    "linear_cross_entropy_bwd",
    "Tensor dloss, Tensor dx, Tensor dweight, Tensor dbias",
    "(Tensor, Tensor, Tensor)",
    implementation=linear_cross_entropy_bwd_ref,
    fake=linear_cross_entropy_bwd_fake,
)
register_sharding("linear_cross_entropy", _sharding)
register_sharding("linear_cross_entropy_fwd", _fwd_sharding)
register_sharding("linear_cross_entropy_bwd", _bwd_sharding)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    float_logits: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(x, weight, bias), target) for x [..., D], weight [V, D] and int64 targets, one a row of x.

    float_logits: widen the logits to float32 before the loss, which then is float32. softcap: of the logits, if not 0.

    Raises TypeError for dtypes that
    are no floats or differ and a target that is not int64, ValueError for shapes that do not fit and a reduction other
    than "mean" and "sum".
    """
    _check("linear_cross_entropy", x, weight, bias, target, reduction)
    flags = (ignore_index, reduction, label_smoothing, float_logits, softcap)
    return torch.ops.infuse.linear_cross_entropy(x, weight, bias, target, *flags)  # type: ignore[no-any-return]
