"""An RMSNorm that is split between the linears on both its sides, so that no kernel stands between theirs.

    linear_add_scale             sum = residual + (x @ weight^T + bias);  scaled = sum * (weight_offset + norm_weight)
                                 squares[.., i] = sum of sum[.., 4 i : 4 i + 4]^2
    scaled_linear                y_i = (scaled @ weights[i]^T) * rsqrt(mean(sum^2) + eps) + biases[i]
    scaled_linear_swiglu         act(gate) * up of two such

A row's factor is the same for all its elements, so it may as well be applied to the sums of products. Rounded before
that are values of another scale, which in bfloat16, whose range is that of float32, is as exact; in float16 they could
overflow. Inference only: infuse.lowering.split_norms, behind autograd, puts these in the place of linear_add and
norm_linear or norm_linear_swiglu, where the kernels of csrc/skinny_linear run.

Shapes: x [.., D]; weight [F, D]; residual, sum, scaled [.., F]; norm_weight [F] or None; squares [.., F / 4]. Of the
second half scaled [.., D], weights [F_i, D], y_i [.., F_i]. Dtypes: one, but for squares, which are float32. Results
are rounded once; in_float32 widens them after that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks, library, linear_swiglu, skinny_linear_kernels
from infuse.ops.linear_add import linear_add_ref
from infuse.ops.linear_kernels import Linears, as_rows, run_skinny
from infuse.ops.norm_linear import check_linears
from infuse.ops.registration import implement, register
from infuse.ops.swiglu import swiglu_ref

SQUARES_WIDTH = 4  # neighbouring features whose squares are added up
_FEATURES_STEP = 16
_FEWEST_ROWS = 9  # of fewer the kernel normalises x itself
_CAPABILITY = (9, 0)


def can_split(x: Tensor, norm_weight: Tensor | None, features: int) -> str:
    """Why the kernels cannot split the norm of a linear's result, "" when they can.

    x: what either linear reads. features: that the norm is over. Reads shapes and dtypes only. What the kernels for
    linears cannot take at all is not asked.
    """
    rows = x.shape[:-1].numel()
    if x.dtype != torch.bfloat16:
        return f"no half of a norm in {x.dtype}, whose range it may leave"
    if norm_weight is not None and norm_weight.dtype != x.dtype:
        return f"no half of a norm with a weight in {norm_weight.dtype} beside {x.dtype}"
    if rows < _FEWEST_ROWS or features % _FEATURES_STEP:
        return f"no half of a norm of {rows} rows of {features}"
    if library.capability(x.device) != _CAPABILITY:
        return "no half of a norm on this GPU"
    return ""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def linear_add_scale_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain torch."""
    total = linear_add_ref(x, weight, bias, residual).contiguous()
    if norm_weight is not None:
        checks.rank("linear_add_scale", "norm_weight", norm_weight, 1, "[F]")
        checks.equal("linear_add_scale", "norm_weight: size", norm_weight.shape[0], total.shape[-1])
    wide = total.to(_wide(total.dtype))
    squares = wide.square().unflatten(-1, (-1, SQUARES_WIDTH)).sum(-1)
    scaled = wide if norm_weight is None else wide * (norm_weight.to(wide.dtype) + weight_offset)
    return total, scaled.to(total.dtype, copy=True), squares


def _products(
    scaled: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    eps: float,
    eps_as_minimum: bool,
) -> list[Tensor]:
    """The linears behind the norm, before they are rounded."""
    size = scaled.shape[-1]
    check_linears("scaled_linear", size, weights, biases)
    checks.equal("scaled_linear", "squares: size of the last dimension", squares.shape[-1], size // SQUARES_WIDTH)
    wide = _wide(scaled.dtype)
    mean = squares.to(wide).sum(-1, keepdim=True) / size
    factor = (mean.clamp_min(eps) if eps_as_minimum else mean + eps).rsqrt()
    products = [F.linear(scaled.to(wide), weight.to(wide)) * factor for weight in weights]
    return [product if bias is None else product + bias for product, bias in zip(products, biases)]


def scaled_linear_ref(
    scaled: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    eps: float,
    eps_as_minimum: bool,
    in_float32: bool,
) -> list[Tensor]:
    """The formula in plain torch."""
    rounded = [y.to(scaled.dtype) for y in _products(scaled, squares, weights, biases, eps, eps_as_minimum)]
    return [y.to(_wide(y.dtype)) for y in rounded] if in_float32 else rounded


def scaled_linear_swiglu_ref(
    scaled: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    order: str,
    activation: str,
    eps: float,
    eps_as_minimum: bool,
) -> list[Tensor]:
    """The formula in plain torch; one result."""
    gate, up, gate_bias, up_bias = linear_swiglu.split_gate_up(weights, biases, order)
    gate, up = _products(scaled, squares, [gate, up], [gate_bias, up_bias], eps, eps_as_minimum)
    return [swiglu_ref(gate, up, activation).to(scaled.dtype)]


def run_first(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What infuse::linear_add_scale does on a GPU."""
    total, scaled = (residual.new_empty(residual.shape) for _ in range(2))
    squares = residual.new_empty((*residual.shape[:-1], residual.shape[-1] // SQUARES_WIDTH), dtype=torch.float32)
    skinny_linear_kernels.run(
        as_rows(x),
        [weight],
        [as_rows(total)],
        [bias],
        norm_weight=norm_weight,
        weight_offset=weight_offset,
        addend=as_rows(residual),
        scaled_out=as_rows(scaled),
        squares_out=as_rows(squares),
    )
    return total, scaled, squares


def run_second(
    scaled: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    eps: float,
    eps_as_minimum: bool,
    in_float32: bool = False,
    activation: str = "",
) -> list[Tensor]:
    """What infuse::scaled_linear does on a GPU; with an activation the weights are gate and up of one result."""
    norm = (eps, 0.0, False, eps_as_minimum)
    more: dict[str, Any] = {"activation": activation, "in_float32": in_float32, "squares": squares}
    return run_skinny(Linears(scaled, tuple(weights), tuple(biases), norm=norm, **more), -1)


def run_second_swiglu(
    scaled: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    order: str,
    activation: str,
    eps: float,
    eps_as_minimum: bool,
) -> list[Tensor]:
    """What infuse::scaled_linear_swiglu does on a GPU."""
    gate, up, *gate_up_biases = linear_swiglu.split_gate_up(weights, biases, order)
    return run_second(scaled, squares, [gate, up], gate_up_biases, eps, eps_as_minimum, activation=activation)


_SECOND = "Tensor scaled, Tensor squares, Tensor[] weights, Tensor?[] biases"
_OPERATORS: tuple[tuple[str, str, str, Callable[..., Any], Callable[..., Any]], ...] = (
    (
        "linear_add_scale",
        "Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? norm_weight, float weight_offset",
        "(Tensor, Tensor, Tensor)",
        linear_add_scale_ref,
        run_first,
    ),
    (
        "scaled_linear",
        f"{_SECOND}, float eps, bool eps_as_minimum, bool in_float32",
        "Tensor[]",
        scaled_linear_ref,
        run_second,
    ),
    (
        "scaled_linear_swiglu",
        f"{_SECOND}, str order, str activation, float eps, bool eps_as_minimum",
        "Tensor[]",
        scaled_linear_swiglu_ref,
        run_second_swiglu,
    ),
)
for _name, _arguments, _returns, _formula, _kernel in _OPERATORS:
    register(_name, _arguments, _returns, implementation=_formula, fake=_formula)
    implement(_name, _kernel, "CUDA")
