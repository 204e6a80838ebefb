"""The kernels of linears with what stands around them, as operators that allocate their results.

`infuse::<kind>_kernel` takes the arguments of `infuse::<kind>`, for the kinds of `KINDS`, then the family
of kernels and the number of its configuration, -1 for the launcher's choice:

    skinny   up to 64 rows, csrc/skinny_linear
    gated    gate and up projections of many rows, csrc/gated_linear

linear_swiglu_fwd_kernel(x, weights, biases, order, activation, config) is linear_swiglu_fwd by the second family,
gate_up_products(x, weights, biases, order) its second result alone, by torch's products.

Weights stay where they are: the halves of a packed one are given to the kernel as views.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from infuse.ops import (
    gated_linear_kernels,
    grouped_linear_swiglu,
    linear_add,
    linear_swiglu,
    norm_linear,
    norm_linear_swiglu,
    skinny_linear_kernels,
)
from infuse.ops.gated_mlp_passes import linear_swiglu_fwd_fake
from infuse.ops.norm_linear_swiglu import NUM_NORM_FLAGS
from infuse.ops.registration import define, implement, register_fake
from infuse.ops.swiglu import QUICK_GELU_ALPHA

DTYPES = skinny_linear_kernels.DTYPES  # of both families
_NORM_NUMBERS = ("eps", "weight_offset", "cast_before_weight", "eps_as_minimum")


@dataclass(frozen=True, slots=True)
class Linears:
    """What a kernel computes. norm: (eps, weight_offset, cast_before_weight, eps_as_minimum), None without a norm.

    activation: of the first product, which the second is multiplied with; "" where all products are results.
    offsets: ends of groups of rows, each with weights of its own, [E, F, D]; None where x [E, C, D] holds equal groups.
    in_float32: the results are widened, after they were rounded.
    squares: x was scaled by the norm's weight already, and has these; see infuse.ops.split_norm.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    residual: Tensor | None = None
    norm: tuple[Any, ...] | None = None
    norm_weight: Tensor | None = None
    activation: str = ""
    addend: Tensor | None = None
    offsets: Tensor | None = None
    in_float32: bool = False
    squares: Tensor | None = None


def _read_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight: Tensor | None,
    *numbers: Any,
) -> Linears:
    *norm, in_float32 = numbers
    return Linears(x, tuple(weights), tuple(biases), residual, tuple(norm), norm_weight, in_float32=in_float32)


def _read_norm_linear_swiglu(
    x: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    order: str,
    norm_weight: Tensor | None,
    eps: float,
    *flags: Any,
) -> Linears:
    gate, up, gate_bias, up_bias = linear_swiglu.split_gate_up(weights, biases, order)
    norm, (activation, *_) = (eps, *flags[:NUM_NORM_FLAGS]), flags[NUM_NORM_FLAGS:]
    return Linears(x, (gate, up), (gate_bias, up_bias), residual, norm, norm_weight, activation)


def _read_linear_swiglu(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, activation: str, *_: Any
) -> Linears:
    gate, up, gate_bias, up_bias = linear_swiglu.split_gate_up(weights, biases, order)
    return Linears(x, (gate, up), (gate_bias, up_bias), activation=activation)


def _read_linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Linears:
    return Linears(x, (weight,), (bias,), addend=residual)


def _read_grouped(
    x: Tensor, weights: Sequence[Tensor], offsets: Tensor | None, order: str, activation: str, *_: Any
) -> Linears:
    gate, up = weights if len(weights) == 2 else linear_swiglu.halves(weights[0], order)
    return Linears(x, (gate.mT, up.mT), (None, None), activation=activation, offsets=offsets)


@dataclass(frozen=True, slots=True)
class Kind:
    """An operator with kernels. arguments: of its schema. fake: the operator itself, or its formula."""

    arguments: str
    returns: str
    read: Callable[..., Linears]
    formula: Callable[..., Any]


KINDS = {
    "norm_linear": Kind(norm_linear.ARGUMENTS, "Tensor[]", _read_norm_linear, norm_linear.norm_linear_ref),
    "norm_linear_swiglu": Kind(
        norm_linear_swiglu.ARGUMENTS,
        "Tensor[]",
        _read_norm_linear_swiglu,
        norm_linear_swiglu.norm_linear_swiglu_ref,
    ),
    "linear_swiglu": Kind(linear_swiglu.ARGUMENTS, "Tensor", _read_linear_swiglu, linear_swiglu.linear_swiglu_ref),
    "grouped_linear_swiglu": Kind(
        grouped_linear_swiglu.ARGUMENTS, "Tensor", _read_grouped, grouped_linear_swiglu.grouped_linear_swiglu_ref
    ),
    "linear_add": Kind(linear_add.ARGUMENTS, "Tensor", _read_linear_add, linear_add.linear_add_ref),
}
# The operators that the kernels serve.
OPERATORS = (*KINDS, "gated_mlp", "gated_mlp_bwd")
_GATED = ("linear_swiglu", "grouped_linear_swiglu")


def with_defaults(kind: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of `infuse::<kind>` with those that have defaults."""
    schema = getattr(torch.ops.infuse, kind).default._schema.arguments
    return (*args, *(argument.default_value for argument in schema[len(args) :]))


@dataclass(frozen=True, slots=True)
class Sizes:
    """x [rows, inputs], all weights together [outputs, inputs]."""

    rows: int
    inputs: int
    outputs: int


def families(kind: str, args: Sequence[Any]) -> tuple[dict[str, Sizes], str]:
    """The families of kernels that can compute a site, each with its sizes, and why there is none.

    args: of `infuse::<kind>`, real or fake. Reads shapes, strides, dtypes and numbers only.
    """
    if reason := _unknown_number(kind, args):
        return {}, reason
    given = KINDS[kind].read(*args)
    if not all(type(size) is int for size in given.x.shape):
        return {}, "the number of rows is symbolic"
    rows = given.x.shape[:-1].numel()
    sizes = Sizes(rows, given.x.shape[-1], sum(weight.shape[-2] for weight in given.weights))
    reasons = {"skinny": _cannot_be_skinny(given)}
    if kind in _GATED:
        reasons["gated"] = _cannot_be_gated(given)
    found = {family: sizes for family, reason in reasons.items() if not reason}
    return found, "" if found else [*reasons.values()][-1]


def _unknown_number(kind: str, args: Sequence[Any]) -> str:
    """What of a site's numbers no kernel knows."""
    if any(isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)) for arg in args):
        return "a number is symbolic"
    if "swiglu" in kind and (args[-3] is not None or args[-2] != QUICK_GELU_ALPHA or args[-1] != 0.0):
        return "no kernel for a gate with limits"
    return ""


def _cannot_be_skinny(given: Linears) -> str:
    if given.weights[0].dim() == 3:
        return "no kernel for few rows of many experts"
    return skinny_linear_kernels.can_run(
        given.x,
        given.weights,
        given.biases,
        residual=given.residual,
        norm=given.norm is not None,
        norm_weight=given.norm_weight,
        cast_before_weight=given.norm is not None and given.norm[2],
        activation=given.activation,
        addend=given.addend,
    )


def _cannot_be_gated(given: Linears) -> str:
    (gate, up), (gate_bias, up_bias) = given.weights, given.biases
    return gated_linear_kernels.can_compute(given.x, gate, up, gate_bias, up_bias, given.offsets, given.activation)


@overload
def as_rows(tensor: Tensor) -> Tensor: ...
@overload
def as_rows(tensor: Tensor | None) -> Tensor | None: ...
def as_rows(tensor: Tensor | None) -> Tensor | None:
    """[..., D] as [R, D]."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def run_skinny(given: Linears, config: int) -> list[Tensor]:
    """The results, and behind them the sum with the residual, if there is one."""
    sizes = [given.weights[0].shape[0]] if given.activation else [weight.shape[0] for weight in given.weights]
    dtype = torch.float32 if given.in_float32 else given.x.dtype
    results = [given.x.new_empty((*given.x.shape[:-1], size), dtype=dtype) for size in sizes]
    total = None if given.residual is None else given.x.new_empty(given.x.shape)
    skinny_linear_kernels.run(
        as_rows(given.x),
        given.weights,
        [result.view(-1, result.shape[-1]) for result in results],
        given.biases,
        residual=as_rows(given.residual),
        norm=given.norm is not None and given.squares is None,
        norm_weight=given.norm_weight,
        **dict(zip(_NORM_NUMBERS, given.norm or ())),
        activation=given.activation,
        addend=as_rows(given.addend),
        squares=as_rows(given.squares),
        sum_out=as_rows(total),
        config=config,
    )
    return results if total is None else [*results, total]


def _run_gated(given: Linears, config: int, gate_up: Tensor | None = None) -> list[Tensor]:
    """gate_up: [.., 2F], written too if it is given."""
    x, (gate, up), (gate_bias, up_bias) = as_rows(given.x), given.weights, given.biases
    out = given.x.new_empty((*given.x.shape[:-1], gate.shape[-2]))
    offsets = _equal_ends(given.x) if gate.dim() == 3 and given.offsets is None else given.offsets
    given_rows = (x, gate, up, gate_bias, up_bias, offsets, out.view(-1, out.shape[-1]), as_rows(gate_up))
    gated_linear_kernels.gated_linear(*given_rows, activation=given.activation, config=config)
    return [out]


def _equal_ends(x: Tensor) -> Tensor:
    """The ends of the groups of rows of x [E, C, D]."""
    groups, size, _ = x.shape
    return torch.arange(size, groups * size + 1, size, dtype=torch.int32, device=x.device)


_FAMILIES = {"skinny": run_skinny, "gated": _run_gated}
# The names of their tables of configurations.
CONFIGURATIONS = {"skinny": skinny_linear_kernels.FAMILY, "gated": gated_linear_kernels.NAME}


def implementation(kind: Kind) -> Callable[..., Any]:
    """What an operator with kernels does on the device that has them."""

    def run(*args: Any) -> Any:
        *given, family, config = args
        results = _FAMILIES[family](kind.read(*given), config)
        return results[0] if kind.returns == "Tensor" else results

    return run


def _fake(kind: Kind) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        results = kind.formula(*args[:-2])
        return results.contiguous() if kind.returns == "Tensor" else [result.contiguous() for result in results]

    return run


def run_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, activation: str, config: int
) -> tuple[Tensor, Tensor]:
    """What infuse::linear_swiglu_fwd_kernel does on the device that has kernels."""
    given = _read_linear_swiglu(x, weights, biases, order, activation)
    gate_up = x.new_empty((*x.shape[:-1], 2 * given.weights[0].shape[0]))
    (h,) = _run_gated(given, config, gate_up)
    return h, gate_up


def gate_up_products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str) -> Tensor:
    """What infuse::gate_up_products does on a GPU: torch's products, each written to its half."""
    gate, up, gate_bias, up_bias = linear_swiglu.split_gate_up(weights, biases, order)
    gate_up = x.new_empty((*x.shape[:-1], 2 * gate.shape[0]))
    rows = as_rows(x)
    for weight, bias, half in zip((gate, up), (gate_bias, up_bias), gate_up.view(-1, gate_up.shape[-1]).chunk(2, -1)):
        if bias is None:
            torch.mm(rows, weight.t(), out=half)
        else:
            torch.addmm(bias, rows, weight.t(), out=half)
    return gate_up


define("gate_up_products(Tensor x, Tensor[] weights, Tensor?[] biases, str order) -> Tensor")
implement("gate_up_products", gate_up_products, "CompositeExplicitAutograd")
register_fake(
    "gate_up_products", lambda x, weights, biases, order: linear_swiglu_fwd_fake(x, weights, biases, order)[1]
)
define(
    "linear_swiglu_fwd_kernel(Tensor x, Tensor[] weights, Tensor?[] biases, str order, str activation, int config) "
    "-> (Tensor, Tensor)"
)
implement("linear_swiglu_fwd_kernel", run_forward, "CUDA")
register_fake(
    "linear_swiglu_fwd_kernel",
    lambda *args: linear_swiglu_fwd_fake(*args[:-1], None, QUICK_GELU_ALPHA, 0.0),
)
for _name, _kind in KINDS.items():
    _arguments = re.sub("=[^,]*", "", _kind.arguments)  # those behind a default would need one
    define(f"{_name}_kernel({_arguments}, str family, int config) -> {_kind.returns}")
    implement(f"{_name}_kernel", implementation(_kind), "CUDA")
    register_fake(f"{_name}_kernel", _fake(_kind))
