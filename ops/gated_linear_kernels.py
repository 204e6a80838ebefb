"""The CUDA kernels of gated linears as an operator that writes into tensors it is given, and what these take.

    out = act(x Wg^T + bg) * (x Wu^T + bu)

gated_linear_out: both products and the activation in one kernel, see csrc/gated_linear. x [R, D], bfloat16 or float16,
any row stride that is a multiple of 16 bytes; weights [F, D], adjacent along D (any such row stride, so halves and
every second row of a packed weight are taken as they are) or along F (a transposed view); D and F multiples of 8;
biases [F]; out [R, F]. gate_up [R, 2 F], contiguous: gate, then up, rounded; out is then computed from these, and act
is rounded before it is multiplied, as infuse::swiglu does. Without gate_up some kernels do the same, others round once.

With offsets (int32 [E] on the device, ends of groups of rows, as torch._grouped_mm takes them) group e of the rows
meets weights[e] of [E, F, D]; no biases; rows behind the last end are not written.

activation: silu, gelu_tanh or gelu_erf, see infuse.ops.swiglu. config: -1 lets the launcher choose, otherwise an index
into its table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops.registration import define

NAME = "gated_linear"  # of the table of configurations
DTYPES = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")
_ALIGNED = 8  # elements of two bytes in 16 bytes
define(
    "gated_linear_out(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, "
    "Tensor? offsets, str activation, int config, Tensor(a!) out, Tensor(b!)? gate_up) -> ()"
)


def can_compute(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    offsets: Tensor | None = None,
    activation: str = "silu",
) -> str:
    """Why the kernel cannot compute this, "" when it can. x [.., D]. Reads shapes, strides and dtypes only."""
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if activation not in ACTIVATIONS:
        return f"no kernel for {activation}"
    tensors = [tensor for tensor in (gate_weight, up_weight, gate_bias, up_bias) if tensor is not None]
    if any(tensor.dtype != x.dtype for tensor in tensors):
        return "no kernel for dtypes that differ"
    if offsets is not None and (gate_bias is not None or up_bias is not None):
        return "no kernel for biases of groups"
    return _cannot_read(gate_weight, up_weight)


def _cannot_read(gate_weight: Tensor, up_weight: Tensor) -> str:
    weights = (gate_weight, up_weight)
    if gate_weight.shape != up_weight.shape:
        return "no kernel for weights of different shapes"
    sizes = gate_weight.shape[-2:]
    if not all(isinstance(size, int) and size > 0 and size % _ALIGNED == 0 for size in sizes):
        return f"no kernel for weights of {list(sizes)}"
    if not any(all(weight.stride(dim) == 1 for weight in weights) for dim in (-1, -2)):
        return "no kernel for weights with these strides"
    for weight in weights:
        odd = [stride for stride in weight.stride() if stride != 1 and not _is_aligned(stride)]
        if odd:
            return f"no kernel for rows of a weight that begin {odd[0]} elements apart"
    return ""


def _is_aligned(stride: object) -> bool:
    return isinstance(stride, int) and stride > 0 and stride % _ALIGNED == 0


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    offsets: Tensor | None,
    out: Tensor,
    gate_up: Tensor | None = None,
    *,
    activation: str = "silu",
    config: int = -1,
) -> Tensor:
    """`out` [R, F] and `gate_up` [R, 2 F], if it is given, written by the kernel; x [R, D]."""
    by_columns = gate_weight.stride(-1) != 1
    x, weights = readable(x), [readable(weight, by_columns) for weight in (gate_weight, up_weight)]
    torch.ops.infuse.gated_linear_out(x, *weights, gate_bias, up_bias, offsets, activation, config, out, gate_up)
    return out


def readable(tensor: Tensor, by_columns: bool = False) -> Tensor:
    """The tensor, or a copy where what the copy engine reads does not begin at multiples of 16 bytes.

    by_columns: the last dimension but one is what is adjacent. Addresses cannot be seen while compiling.
    """
    if by_columns:
        turned = tensor.transpose(-1, -2)
        fits = readable(turned)
        return tensor if fits is turned else fits.transpose(-1, -2)
    apart = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    if tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1 and all(_is_aligned(stride) for stride in apart):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
