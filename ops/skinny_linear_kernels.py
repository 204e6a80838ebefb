"""The CUDA kernels of linears of few rows (decode) as an operator that writes into tensors it is given.

    s = x + residual             rounded to x's dtype and written to sum_out; without residual: x
    y = rms_norm(s)              infuse.ops.rms_norm's flags; without norm: s
    out_i = y @ weight_i^T + bias_i                                          + addend for out0
    out0 = act(y @ weight0^T + bias0) * (y @ weight1^T + bias1)              with an activation: gate and up

A norm may be split between two calls of 9 to 64 rows, see infuse.ops.split_norm. The first writes scaled_out, out0
times norm_weight, and squares_out; to the second these are x and squares, and its products are multiplied by what of
the norm is left. Both are calls without a norm.

Shapes: x, residual, sum_out [R, D], R up to 64, D a multiple of 8; weights [F_i, D], up to three; biases [F_i]; addend
[R, F_0]; out_i [R, F_i]; scaled_out [R, F_0]; squares_out [R, F_0 / 4]; squares [R, D / 4]. Dtypes: bfloat16 or
float16, one for all; norm_weight also float32, squares only that. Sums are kept in float32 and each result is rounded
once, to x's dtype; an out_i in float32 gets it widened again. Rows of x, residual and the weights are contiguous and
begin at multiples of 16 bytes; views of a packed projection will do: `packed[:F]`, `packed[1::2]`. See
csrc/skinny_linear.

In a CUDA graph the kernels begin to read the weights, and the norm's, while the kernel before them may still run. That
one must not write them. The graph's first kernel waits, and all do outside of graphs.

config: -1 lets the launcher choose, otherwise an index into its table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from infuse.ops.registration import define

DTYPES = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")
MAX_ROWS = 64
MAX_WEIGHTS = 3
FAMILY = "skinny_linear"  # name of the table of configurations
_ROW_BYTES = 16
define(
    "skinny_linear_out(Tensor x, Tensor? residual, bool norm, Tensor? norm_weight, float eps, float weight_offset, "
    "bool cast_before_weight, bool eps_as_minimum, Tensor weight0, Tensor? weight1, Tensor? weight2, Tensor? bias0, "
    "Tensor? bias1, Tensor? bias2, str activation, Tensor? addend, Tensor? squares, int config, Tensor(a!) out0, "
    "Tensor(b!)? out1, Tensor(c!)? out2, Tensor(d!)? sum_out, Tensor(e!)? scaled_out, Tensor(f!)? squares_out) -> ()"
)


def can_run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    *,
    residual: Tensor | None = None,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    cast_before_weight: bool = False,
    activation: str = "",
    addend: Tensor | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> str:
    """Why the kernels cannot compute this, "" when they can. Reads shapes, strides and dtypes only.

    x, residual and addend may have leading dimensions, which count as rows.
    """
    if x.dtype not in DTYPES:
        return f"no kernel for x in {x.dtype}"
    if not all(isinstance(size, int) for size in x.shape):
        return "no kernel for a symbolic number of rows or columns"
    rows = math.prod(x.shape[:-1])
    if rows > MAX_ROWS:
        return f"no kernel for {rows} rows"
    if x.shape[-1] == 0 or x.shape[-1] % 8 != 0:
        return f"no kernel for {x.shape[-1]} columns"
    if activation and (activation not in ACTIVATIONS or limit is not None or up_offset != 0):
        return f"no kernel for the activation {activation} with limit {limit} and up_offset {up_offset}"
    if len(weights) > MAX_WEIGHTS or (activation and len(weights) != 2):
        return f"no kernel for {len(weights)} weights" + (" and an activation" if activation else "")
    if activation and weights[0].shape != weights[1].shape:
        return "gate and up differ in shape"
    for tensor in (*weights, *biases, residual, addend):
        if tensor is not None and tensor.dtype != x.dtype:
            return f"no kernel for {x.dtype} beside {tensor.dtype}"
    return _cannot_norm(x, residual, norm, norm_weight, cast_before_weight) or _cannot_read(x, weights, residual)


def _cannot_norm(
    x: Tensor, residual: Tensor | None, norm: bool, weight: Tensor | None, cast_before_weight: bool
) -> str:
    if not norm:
        return "no kernel for a residual before a linear without a norm" if residual is not None else ""
    if weight is None or weight.dtype == x.dtype:
        return ""
    if weight.dtype != torch.float32 or cast_before_weight:
        return f"no kernel for a norm's weight in {weight.dtype} beside x in {x.dtype}"
    return ""


def _cannot_read(x: Tensor, weights: Sequence[Tensor], residual: Tensor | None) -> str:
    """Pieces of 16 bytes of each row; x and the residual as the matrices that they are after flattening."""
    for name, tensor in (("x", x), ("residual", residual), *(("weight", weight) for weight in weights)):
        if tensor is None:
            continue
        if tensor.stride(-1) != 1:
            return f"no kernel for rows of {name} whose elements are {tensor.stride(-1)} apart"
        steps = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size != 1]
        if any(not isinstance(step, int) or step * tensor.element_size() % _ROW_BYTES or step <= 0 for step in steps):
            return f"no kernel for rows of {name} that are {steps} elements apart"
    return ""


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    *,
    residual: Tensor | None = None,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
    activation: str = "",
    addend: Tensor | None = None,
    squares: Tensor | None = None,
    sum_out: Tensor | None = None,
    scaled_out: Tensor | None = None,
    squares_out: Tensor | None = None,
    config: int = -1,
) -> None:
    """Writes `outs`, and `sum_out` where there is a residual; see the module's text. Matrices have two dimensions."""
    three: list[list[Tensor | None]] = [[*given, None, None, None][:MAX_WEIGHTS] for given in (weights, biases, outs)]
    flags = (norm_weight, eps, weight_offset, cast_before_weight, eps_as_minimum)
    torch.ops.infuse.skinny_linear_out(
        x,
        residual,
        norm,
        *flags,
        *three[0],
        *three[1],
        activation,
        addend,
        squares,
        config,
        *three[2],
        sum_out,
        scaled_out,
        squares_out,
    )
