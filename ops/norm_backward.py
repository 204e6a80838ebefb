"""The CUDA kernel behind the backward of the norms: rms_norm, layer_norm, both with a residual add, and the gated one.

    n  = (x - mean) * rstd                                  mean is 0 for RMSNorm
    g  = dy * (weight_offset + weight)                      dy without a weight
    dx = rstd * (g - mean(g) - n * mean(g * n)) + dsum      without mean(g) for RMSNorm; rounded once
    dweight = sum over rows of dy * n, dbias = sum over rows of dy

Shapes: dy, dsum, x, dx [..., D]; weight, bias, dweight, dbias [D]; mean, rstd [...], float32. dsum, the gradient that
reaches the sum of a residual add directly, weight, bias and mean (given: LayerNorm) may be None; gradients of what is
None are empty [0]. dy_1 and dy_2 are further terms of dy, which is their sum in float32, as Inductor takes it where it
fuses the additions. With minimum > 0 the mean of squares is at least that, and the last term of dx drops out in the
rows where rstd comes from it.

Of the operators' flags the kernels know weight_offset, a missing weight or bias, eps as a minimum, and silu and sigmoid
as gates. cast_before_weight and cast_before_gate make no difference to them: they are about roundings that the backward
leaves out. What is left to the formula, `can_run` names: float64, groups, tensors of different dtypes (a weight in
float32 excepted), a stride in the last dimension, more than four dimensions.

gated_norm_backward is that of gated_rms_norm, with a gate [..., D] whose gradient is its second result; see
csrc/norm_backward/formula.cuh.

Where the forward rounded n before the weight multiply, autograd would round g and the n of dweight as well, which only
adds error: here nothing is rounded but the results. All sums are in float32 and in a fixed order: the same input gives
the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops import library
from infuse.ops.registration import define, register_fake

# Those whose backward it is.
OPERATORS = ("rms_norm_bwd", "layer_norm_bwd", "add_rms_norm_bwd", "add_layer_norm_bwd", "gated_rms_norm_bwd")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DY_TERMS = 3


def can_run(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None = None,
    groups: int = 1,
) -> str:
    """Why the kernel cannot take these arguments, "" when it can. Reads shapes, strides and dtypes only."""
    if groups != 1:
        return f"no backward kernel for {groups} groups"
    if x.dtype not in DTYPES:
        return f"no backward kernel for x in {x.dtype}"
    if x.dim() > 4:
        return f"no backward kernel for {x.dim()} dimensions"
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.dtype not in (x.dtype, torch.float32):
            return f"no backward kernel for a {name} in {vector.dtype} beside x in {x.dtype}"
        if vector is not None and vector.shape[0] > 1 and vector.stride(0) != 1:
            return f"no backward kernel for a {name} of stride {vector.stride(0)}"
    for name, tensor in (("dy", dy), ("dsum", dsum), ("x", x), ("gate", gate)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            return f"no backward kernel for {name} in {tensor.dtype} beside x in {x.dtype}"
        if isinstance(x.shape[-1], int) and x.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"no backward kernel for a last dimension of {name} with stride {tensor.stride(-1)}"
    return ""


def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    minimum: float | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """dx, dweight and dbias by the kernel, None where it cannot run."""
    if library.missing(x.device) or can_run(dy, dsum, x, weight, bias):
        return None
    statistics = (None if mean is None else mean.contiguous(), rstd.contiguous())
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.infuse.norm_backward(
        dy, dsum, x, weight, bias, *statistics, weight_offset, -1, minimum=minimum or 0.0
    )
    return found


def gated_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, gate_first: bool, gate_is_silu: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """dx, dgate and dweight by the kernel, None where it cannot run. rstd [..., groups]."""
    if library.missing(x.device) or can_run(dy, None, x, weight, None, gate, rstd.shape[-1]):
        return None
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.infuse.gated_norm_backward(
        dy, x, gate, weight, rstd.contiguous(), gate_first, gate_is_silu, -1
    )
    return found


def norm_backward_fake(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (x.new_empty(0) if vector is None else vector.new_empty(vector.shape) for vector in (weight, bias))
    return x.new_empty(x.shape), dweight, dbias


def gated_norm_backward_fake(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


# Implemented by csrc/norm_backward for CUDA alone. config: -1 lets the launcher choose, otherwise an index into its
# table.
define(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd,"
    " float weight_offset, int config, Tensor? dy_1=None, Tensor? dy_2=None, float minimum=0.0)"
    " -> (Tensor, Tensor, Tensor)"
)
# dx goes into `out`, which may be dy, dy_1, dy_2 or dsum, if that is contiguous.
define(
    "norm_backward_into(Tensor(a!) out, Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean,"
    " Tensor rstd, float weight_offset, int config, Tensor? dy_1=None, Tensor? dy_2=None, float minimum=0.0)"
    " -> (Tensor, Tensor)"
)
define(
    "gated_norm_backward(Tensor dy, Tensor x, Tensor gate, Tensor? weight, Tensor rstd, bool gate_first,"
    " bool gate_is_silu, int config, Tensor? dy_1=None, Tensor? dy_2=None) -> (Tensor, Tensor, Tensor)"
)
register_fake("norm_backward", norm_backward_fake)
register_fake("norm_backward_into", lambda out, *arguments: norm_backward_fake(*arguments)[1:])
register_fake("gated_norm_backward", gated_norm_backward_fake)
