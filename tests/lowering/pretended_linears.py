"""The kernels of linears as the lowering sees them, computed by their formulas on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops.add_rms_norm import add_rms_norm_ref
from infuse.ops.rms_norm import rms_norm_ref
from infuse.ops.split_norm import SQUARES_WIDTH, scaled_linear_ref
from infuse.ops.swiglu import QUICK_GELU_ALPHA, swiglu_bwd_ref, swiglu_ref


def skinny_on_cpu(x: Tensor, residual: Tensor | None, norm: bool, norm_weight: Tensor | None, *rest: Any) -> None:
    """skinny_linear_out, which gets rows and writes all of its results."""
    eps, offset, early, minimum, *rest = rest
    (w0, w1, w2, b0, b1, b2, activation, addend, squares, _, *outs, total, scaled, squares_out) = rest
    assert squares is None or not norm
    y, flags = x, (norm_weight, eps, offset, early, minimum)
    assert x.dim() == 2 and (residual is None) == (total is None)
    if residual is not None:
        y, found = add_rms_norm_ref(x, residual, *flags) if norm else (x + residual,) * 2
        total.copy_(found)
    elif norm:
        y = rms_norm_ref(x, *flags)
    weights = [weight for weight in (w0, w1, w2) if weight is not None]
    if squares is None:
        products = [F.linear(y, w, b) for w, b in zip(weights, (b0, b1, b2))]
    else:
        products = scaled_linear_ref(x, squares, weights, (b0, b1, b2)[: len(weights)], eps, minimum, False)
    if activation:
        products = [swiglu_ref(*products, activation)]
    if addend is not None:
        products[0] = addend + products[0]
    given = [out for out in outs if out is not None]
    assert len(given) == len(products)
    for out, product in zip(given, products):
        out.copy_(product)
    if scaled is not None:
        scaled.copy_(products[0].float() * (norm_weight.float() + offset if norm_weight is not None else 1.0))
        squares_out.copy_(products[0].float().square().unflatten(-1, (-1, SQUARES_WIDTH)).sum(-1))


def gated_on_cpu(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    offsets: Tensor | None,
    activation: str,
    config: int,
    out: Tensor,
    gate_up: Tensor | None,
) -> None:
    """gated_linear_out."""
    if offsets is not None:
        assert offsets[-1] == len(x), "measured with rows that belong to no group"
        assert gate_weight.stride(-1) == 1, "a copy of weights that were given transposed"
        first = 0
        for expert, last in enumerate(offsets.tolist()):
            rows = slice(first, last)
            gated_on_cpu(
                *(
                    x[rows],
                    gate_weight[expert],
                    up_weight[expert],
                    None,
                    None,
                    None,
                    activation,
                    config,
                    out[rows],
                    None,
                )
            )
            first = last
        return
    gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
    out.copy_(swiglu_ref(gate, up, activation))
    if gate_up is not None:
        gate_up.copy_(torch.cat((gate, up), -1))


def gated_backward_on_cpu(
    dout: Tensor, gate_up: Tensor, activation: str, config: int, dgate_up: Tensor, out: Tensor | None
) -> None:
    """gated_backward_out."""
    gate, up = gate_up.chunk(2, -1)
    dgate_up.copy_(torch.cat(swiglu_bwd_ref(dout, gate, up, activation, None, QUICK_GELU_ALPHA, 0.0), -1))
    if out is not None:
        out.copy_(swiglu_ref(gate, up, activation))


def linear_gated_backward_on_cpu(
    dy: Tensor, down_weight: Tensor, gate_up: Tensor, activation: str, config: int, *written: Tensor | None
) -> None:
    """linear_gated_backward_out."""
    dgate_up, out = written
    assert dgate_up is not None
    gated_backward_on_cpu(dy @ down_weight, gate_up, activation, config, dgate_up, out)


def linear_pair_on_cpu(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor, config: int, dx: Tensor) -> None:
    """linear_pair_out."""
    dx.copy_(dgate_up @ torch.cat((gate_weight, up_weight)))
