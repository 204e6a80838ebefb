"""Operators that stand for several others: values and gradients of each overload, registration, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils import _pytree as pytree

from infuse.ops import linear_add as _linear_add  # noqa: F401  importing an operator's module registers it
from infuse.ops import norm_linear as _norm_linear  # noqa: F401
from infuse.ops import norm_linear_swiglu as _norm_linear_swiglu  # noqa: F401
from infuse.ops import packed_linear as _packed_linear  # noqa: F401
from infuse.ops import qk_norm_rope as _qk_norm_rope  # noqa: F401
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse
Case = tuple[str, Callable[..., Any], Callable[..., tuple[Any, ...]]]


def linears(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    weights = [leaf(size, 8, dtype=dtype) for size in sizes]
    return weights, [leaf(size, dtype=dtype) if i == 1 else None for i, size in enumerate(sizes)]


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def norm_args(dtype: torch.dtype) -> tuple[Any, ...]:
    return leaf(2, 3, 8, dtype=dtype), None, *linears((4, 6), dtype), leaf(8, dtype=dtype), 1e-6


def norm_formula(x: Tensor, residual: Tensor | None, weights: Any, biases: Any, weight: Tensor, eps: float) -> Any:
    total = x if residual is None else x + residual
    y = F.rms_norm(total, (8,), weight, eps)
    outs = [F.linear(y, w, b) for w, b in zip(weights, biases)]
    return outs if residual is None else [*outs, total]


def add_norm_args(dtype: torch.dtype) -> tuple[Any, ...]:
    x, _, *rest = norm_args(dtype)
    return x, leaf(2, 3, 8, dtype=dtype), *rest


def wide_args(dtype: torch.dtype) -> tuple[Any, ...]:
    return *add_norm_args(dtype), 0.0, False, False, True


def wide_formula(*args: Any) -> Any:
    *outs, total = norm_formula(*args[:6])
    return [*(out.to(torch.promote_types(out.dtype, torch.float32)) for out in outs), total]


def packed_args(dtype: torch.dtype) -> tuple[Any, ...]:
    return leaf(2, 3, 8, dtype=dtype), *linears((4, 6, 4), dtype)


def packed_already_args(dtype: torch.dtype) -> tuple[Any, ...]:
    return leaf(2, 3, 8, dtype=dtype), [leaf(14, 8, dtype=dtype)], [leaf(14, dtype=dtype)], [4, 6, 4]


def linear_add_args(dtype: torch.dtype) -> tuple[Any, ...]:
    return leaf(2, 3, 8, dtype=dtype), leaf(4, 8, dtype=dtype), leaf(4, dtype=dtype), leaf(2, 3, 4, dtype=dtype)


def norm_gate_args(dtype: torch.dtype) -> tuple[Any, ...]:
    x, _, *_, weight, eps = norm_args(dtype)
    return x, None, *linears((6, 6), dtype), "gate_up", weight, eps


def add_norm_gate_args(dtype: torch.dtype) -> tuple[Any, ...]:
    x, residual, *_, weight, eps = add_norm_args(dtype)
    return x, residual, *linears((12,), dtype), "interleaved", weight, eps, 1.0, False, False, "gelu_erf"


def norm_gate_formula(
    x: Tensor, residual: Tensor | None, weights: Any, biases: Any, order: str, weight: Tensor, eps: float, *flags: Any
) -> Any:
    if residual is None:
        gate, up = norm_formula(x, None, weights, biases, weight, eps)
        return [F.silu(gate) * up]
    packed, total = norm_formula(x, residual, weights, biases, weight + 1.0, eps)
    return [F.gelu(packed[..., ::2]) * packed[..., 1::2], total]


def qk_norm_args(dtype: torch.dtype) -> tuple[Any, ...]:
    tables = [leaf(3, 8, dtype=dtype) for _ in range(2)]
    return (
        *(leaf(2, 4, 3, 8, dtype=dtype), *tables, leaf(8, dtype=dtype), leaf(8, dtype=dtype)),
        *(1e-6, True, 0.0, False, False, False, False, False, False),
    )


def qk_rms_norm_args(dtype: torch.dtype) -> tuple[Any, ...]:
    x, cos, sin, weight, *_ = qk_norm_args(dtype)
    return x, cos, sin, weight, None, 1e-6, False, 0.0, False, False, False, False, False, False


def qk_norm_formula(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, *flags: Any
) -> Tensor:
    y = F.layer_norm(x, (8,), weight, bias, eps) if centered else F.rms_norm(x, (8,), weight, eps)
    return y * cos + torch.cat((-y[..., 4:], y[..., :4]), dim=-1) * sin


CASES: list[Case] = [
    ("norm_linear", norm_formula, norm_args),
    ("norm_linear", norm_formula, add_norm_args),
    ("norm_linear", wide_formula, wide_args),
    ("norm_linear_swiglu", norm_gate_formula, norm_gate_args),
    ("norm_linear_swiglu", norm_gate_formula, add_norm_gate_args),
    ("linear_add", lambda x, w, b, r: F.linear(x, w, b) + r, linear_add_args),
    ("packed_linear", lambda x, ws, bs, sizes: list(F.linear(x, *ws, *bs).split(sizes, -1)), packed_already_args),
    ("packed_linear", lambda x, ws, bs: [F.linear(x, w, b) for w, b in zip(ws, bs)], packed_args),
    ("qk_norm_rope", qk_norm_formula, qk_norm_args),
    ("qk_norm_rope", qk_norm_formula, qk_rms_norm_args),
]
IDS = [
    *(
        "norm",
        "add and norm",
        "add, norm and float32",
        "norm and gate",
        "add, norm and gate",
        "linear and add",
        "packed already",
        "packed",
    ),
    *("LayerNorm and rotation", "RMSNorm and rotation"),
]


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overload", ["default", "inline", "parts"])
@pytest.mark.parametrize(("name", "formula", "make"), CASES, ids=IDS)
def test_value_and_gradients_are_as_near_to_float64_as_eager(
    name: str, formula: Callable[..., Any], make: Callable[..., Any], overload: str, dtype: torch.dtype
) -> None:
    args = make(dtype)
    doubles = pytree.tree_map_only(Tensor, lambda t: t.detach().double().requires_grad_(), args)
    got, eager, exact = (
        flat(getattr(getattr(OPS, name), overload)(*args)),
        flat(formula(*args)),
        flat(formula(*doubles)),
    )
    assert len(got) == len(eager)
    for mine, theirs, right in zip(got, eager, exact):
        assert_close_to_fp64(mine, theirs, right)
    douts = [torch.randn_like(result) for result in eager]
    leaves, wide = ([leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, doubles))
    gradients = [torch.autograd.grad(results, leaves, douts) for results in (got, eager)]
    reference = torch.autograd.grad(exact, wide, [dout.double() for dout in douts])
    for mine, theirs, right in zip(*gradients, reference):
        assert not mine.requires_grad
        assert_close_to_fp64(mine, theirs, right)


@pytest.mark.parametrize(("name", "formula", "make"), CASES, ids=IDS)
def test_second_derivatives(name: str, formula: Callable[..., Any], make: Callable[..., Any]) -> None:
    args = make(torch.float64)
    leaves, spec = pytree.tree_flatten(args)
    wanted = [i for i, item in enumerate(leaves) if isinstance(item, Tensor)]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for i, tensor in zip(wanted, tensors):
            given[i] = tensor
        return tuple(flat(getattr(OPS, name)(*pytree.tree_unflatten(given, spec))))

    tensors = tuple(leaves[i] for i in wanted)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(("name", "formula", "make"), CASES, ids=IDS)
def test_opcheck_passes(name: str, formula: Callable[..., Any], make: Callable[..., Any]) -> None:
    opcheck(getattr(OPS, name).default, make(torch.float32))


def test_linears_that_do_not_fit_are_refused() -> None:
    x, weight = torch.ones(3, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="1 weights and 2 biases"):
        OPS.packed_linear(x, [weight], [None, None])
    with pytest.raises(ValueError, match="size of dimension 0: got 4, expected 5"):
        OPS.packed_linear(x, [weight], [None], [2, 3])
    with pytest.raises(ValueError, match="got 2 weights with sizes"):
        OPS.packed_linear(x, [weight, weight], [None, None], [4, 4])
    with pytest.raises(ValueError, match="size of dimension 1: got 6, expected 8"):
        OPS.packed_linear(x, [weight, torch.ones(4, 6)], [None, None])
    with pytest.raises(ValueError, match="bias: size: got 3, expected 4"):
        OPS.linear_add(x, weight, torch.ones(3), x)
    with pytest.raises(ValueError, match="0 weights"):
        OPS.norm_linear(x, None, [], [], None, 1e-6)


def test_norm_arguments_that_contradict_are_refused() -> None:
    x, cos, sin, weight, *_ = qk_norm_args(torch.float32)
    flags = (False, False, False, False)
    with pytest.raises(ValueError, match="bias: got a tensor, expected None without centered"):
        OPS.qk_norm_rope(x, cos, sin, weight, weight, 1e-6, False, 0.0, False, False, *flags)
    with pytest.raises(ValueError, match="eps_as_minimum: got True, expected False with centered"):
        OPS.qk_norm_rope(x, cos, sin, weight, None, 1e-6, True, 0.0, False, True, *flags)
