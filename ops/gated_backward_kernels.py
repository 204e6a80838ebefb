"""The CUDA kernels of a gated MLP's gradients, y = (act(x Wg^T) * (x Wu^T)) Wd^T, and what they take.

gated_backward_out: dgate_up [R, 2F], dgate then dup, and out [R, F], the product again, from dout [R, F] and gate_up
[R, 2F]; formulas and activations as of infuse::swiglu_bwd and infuse::swiglu without a limit.

linear_gated_backward_out: the same with dout = dy @ down_weight, dy [R, D], down_weight [D, F], which is never written.

linear_pair_out: dx [R, D] = dgate_up[:, :F] @ gate_weight + dgate_up[:, F:] @ up_weight, weights [F, D], in one GEMM.

bfloat16 or float16. Elements of a row are adjacent, rows any number of elements apart; for the two GEMMs they begin at
multiples of 16 bytes, and D and F are multiples of 8. What is written is contiguous. config: -1 lets the launcher
choose, otherwise an index into its table. See csrc/gated_backward.

gated_backward, linear_gated_backward and linear_pair_product allocate their results; they take leading dimensions as
[.., F], and copy what the kernels cannot read. wants_out: otherwise out is empty, [0].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infuse.ops import library
from infuse.ops.attention_operands import readable
from infuse.ops.registration import define, implement, register_fake

# Names of the tables of configurations.
GATED_BACKWARD, GEMMS = "gated_backward", "gated_backward_gemms"
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")
DTYPES = (torch.bfloat16, torch.float16)
_GEMM_CAPABILITY = (9, 0)
_STEP = 8  # elements of 16 bytes
define(
    "gated_backward_out(Tensor dout, Tensor gate_up, str activation, int config, Tensor(a!) dgate_up, "
    "Tensor(b!)? out) -> ()"
)
define(
    "linear_gated_backward_out(Tensor dy, Tensor down_weight, Tensor gate_up, str activation, int config, "
    "Tensor(a!) dgate_up, Tensor(b!)? out) -> ()"
)
define("linear_pair_out(Tensor dgate_up, Tensor gate_weight, Tensor up_weight, int config, Tensor(a!) dx) -> ()")
define("gated_backward(Tensor dout, Tensor gate_up, str activation, bool wants_out, int config) -> (Tensor, Tensor)")
define(
    "linear_gated_backward(Tensor dy, Tensor down_weight, Tensor gate_up, str activation, bool wants_out, int config) "
    "-> (Tensor, Tensor)"
)
define("linear_pair_product(Tensor dgate_up, Tensor gate_weight, Tensor up_weight, int config) -> Tensor")


def can_differentiate(dout: Tensor, gate_up: Tensor, activation: str) -> str:
    """Why the kernel of gated_backward cannot compute this, "" when it can. Reads shapes and dtypes only."""
    if activation not in ACTIVATIONS:
        return f"no kernel for {activation}"
    return _cannot_have_dtypes(gate_up, dout)


def can_differentiate_linear(dy: Tensor, down_weight: Tensor, gate_up: Tensor, activation: str) -> str:
    """The same for linear_gated_backward. Reads shapes, strides, dtypes and the device's kind only."""
    reason = can_differentiate(dy, gate_up, activation) or _cannot_have_dtypes(dy, down_weight)
    return reason or _cannot_multiply(dy.device, down_weight)


def can_multiply_pair(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> str:
    """The same for linear_pair_product."""
    reason = _cannot_have_dtypes(dgate_up, gate_weight) or _cannot_have_dtypes(dgate_up, up_weight)
    return reason or _cannot_multiply(dgate_up.device, gate_weight, up_weight)


def _cannot_have_dtypes(first: Tensor, second: Tensor) -> str:
    if first.dtype not in DTYPES or first.dtype != second.dtype:
        return f"no kernel for {first.dtype} and {second.dtype}"
    return ""


def _cannot_multiply(device: torch.device, *weights: Tensor) -> str:
    if library.capability(device) != _GEMM_CAPABILITY:
        return "no kernel for this GPU, which has no compute capability of 9.0"
    for weight in weights:
        rows, columns = weight.shape
        if not all(isinstance(size, int) and size > 0 and size % _STEP == 0 for size in (rows, columns)):
            return f"no kernel for a weight of {rows} x {columns}"
        if weight.stride(1) != 1 or weight.stride(0) % _STEP:
            return f"no kernel for a weight with strides of {weight.stride(0)} and {weight.stride(1)}"
    return ""


def _rows(tensor: Tensor) -> Tensor:
    """[R, F] of [.., F], with adjacent elements in rows that do not overlap; a copy where that takes one."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    fits = rows.stride(1) == 1 or rows.shape[1] == 1
    return rows if fits else rows.contiguous()


def _aligned_rows(tensor: Tensor) -> Tensor:
    rows = readable(_rows(tensor))
    return rows if rows.stride(0) > 0 else rows.contiguous()


def _gradients(shape: torch.Size, gate_up: Tensor, wants_out: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(shape if wants_out else (0,))


def _gated_fake(dout: Tensor, gate_up: Tensor, activation: str, wants_out: bool, config: int) -> tuple[Tensor, Tensor]:
    return _gradients(dout.shape, gate_up, wants_out)


def _gated_backward(
    dout: Tensor, gate_up: Tensor, activation: str, wants_out: bool, config: int
) -> tuple[Tensor, Tensor]:
    dgate_up, out = _gated_fake(dout, gate_up, activation, wants_out, config)
    written = _rows(dgate_up), _rows(out) if wants_out else None
    torch.ops.infuse.gated_backward_out(_rows(dout), _rows(gate_up), activation, config, *written)
    return dgate_up, out


def _linear_gated_fake(
    dy: Tensor, down_weight: Tensor, gate_up: Tensor, activation: str, wants_out: bool, config: int
) -> tuple[Tensor, Tensor]:
    return _gradients(torch.Size((*gate_up.shape[:-1], down_weight.shape[1])), gate_up, wants_out)


def _linear_gated_backward(
    dy: Tensor, down_weight: Tensor, gate_up: Tensor, activation: str, wants_out: bool, config: int
) -> tuple[Tensor, Tensor]:
    dgate_up, out = _linear_gated_fake(dy, down_weight, gate_up, activation, wants_out, config)
    read = _aligned_rows(dy), readable(down_weight), _aligned_rows(gate_up)
    written = _rows(dgate_up), _rows(out) if wants_out else None
    torch.ops.infuse.linear_gated_backward_out(*read, activation, config, *written)
    return dgate_up, out


def _pair_fake(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor, config: int) -> Tensor:
    return dgate_up.new_empty((*dgate_up.shape[:-1], gate_weight.shape[1]))


def _linear_pair_product(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor, config: int) -> Tensor:
    dx = _pair_fake(dgate_up, gate_weight, up_weight, config)
    read = _aligned_rows(dgate_up), readable(gate_weight), readable(up_weight)
    torch.ops.infuse.linear_pair_out(*read, config, _rows(dx))
    return dx


for _name, _function, _fake in (
    ("gated_backward", _gated_backward, _gated_fake),
    ("linear_gated_backward", _linear_gated_backward, _linear_gated_fake),
    ("linear_pair_product", _linear_pair_product, _pair_fake),
):
    implement(_name, _function, "CompositeExplicitAutograd")
    register_fake(_name, _fake)
