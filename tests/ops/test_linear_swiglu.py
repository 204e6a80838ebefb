"""Projections with their activation, plain and by expert, and the gated MLP that trains: values, gradients, layouts,
what is kept for the backward, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from infuse.ops import gated_mlp as _gated_mlp  # noqa: F401  importing an operator's module registers it
from infuse.ops import grouped_linear_swiglu as _grouped  # noqa: F401
from infuse.ops.linear_swiglu import ORDERS, joined, split_gate_up
from tests.ops.test_norms import assert_same_layouts
from tests.tolerances import assert_close_to_fp64

OPS = torch.ops.infuse
DIM, HIDDEN = 6, 16
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "gelu_erf": F.gelu,
}
# (order, separate weights)
FORMS = [("gate_up", True), *((order, False) for order in ORDERS)]


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def make(order: str, separate: bool, dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    """x, weights, biases, order"""
    sizes = (HIDDEN, HIDDEN) if separate else (2 * HIDDEN,)
    weights = [leaf(size, DIM, dtype=dtype) for size in sizes]
    return leaf(2, 3, DIM, dtype=dtype), weights, [leaf(size, dtype=dtype) if bias else None for size in sizes], order


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, act: str) -> Tensor:
    products = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    if len(products) == 1:
        packed = products[0]
        first, second = (
            (packed[..., ::2], packed[..., 1::2])
            if order.startswith("interleaved")
            else (packed[..., :HIDDEN], packed[..., HIDDEN:])
        )
        products = [first, second] if order in ("gate_up", "interleaved") else [second, first]
    return ACTIVATIONS[act](products[0]) * products[1]


def leaves_of(args: Sequence[Any]) -> list[Tensor]:
    flat = [item for arg in args for item in (arg if isinstance(arg, list) else [arg])]
    return [item for item in flat if isinstance(item, Tensor) and item.requires_grad]


def widened(args: Sequence[Any]) -> tuple[Any, ...]:
    def wide(arg: Any) -> Any:
        if isinstance(arg, list):
            return [wide(item) for item in arg]
        is_float = isinstance(arg, Tensor) and arg.is_floating_point()
        return arg.detach().double().requires_grad_(arg.requires_grad) if is_float else arg

    return tuple(wide(arg) for arg in args)


def check(operator: Any, formula: Callable[..., Tensor], args: tuple[Any, ...], *flags: Any) -> None:
    """Value and gradients beside those of eager code."""
    doubles = widened(args)
    got, eager, exact = operator(*args, *flags), formula(*args), formula(*doubles)
    assert_close_to_fp64(got, eager, exact)
    assert got.is_contiguous()
    dout = torch.randn_like(eager)
    mine, theirs = (torch.autograd.grad(result, leaves_of(args), dout) for result in (got, eager))
    right = torch.autograd.grad(exact, leaves_of(doubles), dout.double())
    for grads in zip(mine, theirs, right):
        assert_close_to_fp64(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("order", "separate"), FORMS)
def test_value_and_gradients_are_as_near_to_float64_as_eager(
    order: str, separate: bool, act: str, dtype: torch.dtype
) -> None:
    args = make(order, separate, dtype)
    for overload in ("default", "inline", "parts"):
        check(getattr(OPS.linear_swiglu, overload), lambda *a: reference(*a, act), args, act)


def mlp(args: tuple[Any, ...], dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    return *args, leaf(DIM, HIDDEN, dtype=dtype), leaf(DIM, dtype=dtype) if bias else None


def mlp_reference(x: Tensor, weights: Any, biases: Any, order: str, down: Tensor, down_bias: Tensor | None) -> Tensor:
    return F.linear(reference(x, weights, biases, order, "silu"), down, down_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overload", ["default", "recompute", "inline", "parts"])
@pytest.mark.parametrize(("order", "separate"), FORMS)
def test_mlp_is_as_near_to_float64_as_eager(order: str, separate: bool, overload: str, dtype: torch.dtype) -> None:
    args = mlp(make(order, separate, dtype), dtype)
    check(getattr(OPS.gated_mlp, overload), mlp_reference, args)


@pytest.mark.parametrize("flags", [("silu",), ("quick_gelu", 0.9, 1.3, 0.5)])
@pytest.mark.parametrize("overload", ["default", "recompute"])
@pytest.mark.parametrize(("order", "separate"), FORMS)
def test_derivatives_are_right_in_float64(order: str, separate: bool, overload: str, flags: tuple[Any, ...]) -> None:
    x, weights, biases, *rest = mlp(make(order, separate, torch.float64), torch.float64)
    number = len(weights)
    operator = getattr(OPS.gated_mlp, overload)

    def function(x: Tensor, down: Tensor, down_bias: Tensor, *given: Tensor) -> Tensor:
        return operator(x, list(given[:number]), list(given[number:]), order, down, down_bias, *flags)

    inputs = (x, *rest[1:], *weights, *biases)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


class Called(TorchDispatchMode):
    """The products, and the operators of the backward, that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "mm" or func.namespace == "infuse":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# Whose gradient is wanted -> what the backward calls.
NEEDED = {
    "x": ["linear_gated_bwd", "linear_pair"],
    "gate": ["linear_gated_bwd", "mm"],
    "down": ["mm"],
    "gate bias": ["linear_gated_bwd"],
}


@pytest.mark.parametrize("overload", ["default", "recompute"])
@pytest.mark.parametrize("wanted", NEEDED)
def test_no_gradient_is_computed_that_nobody_wants(wanted: str, overload: str) -> None:
    args = mlp(make("gate_up", True, torch.float32), torch.float32)
    x, weights, biases, _, down, _ = args
    for tensor in leaves_of(args):
        tensor.requires_grad_(False)
    leaf = {"x": x, "gate": weights[0], "down": down, "gate bias": biases[0]}[wanted].requires_grad_()
    expected = torch.autograd.grad(mlp_reference(*args).sum(), leaf)[0]
    result = getattr(OPS.gated_mlp, overload)(*args).sum()
    with Called() as called:
        got = torch.autograd.grad(result, leaf)[0]
    torch.testing.assert_close(got, expected)
    again = {"linear_gated_bwd": "recomputed_gated_bwd"} if overload == "recompute" else {}
    first = ["linear_swiglu"] if (wanted, overload) == ("down", "recompute") else []
    assert called.names == first + [again.get(name, name) for name in NEEDED[wanted]]


def kept(function: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """How many numbers autograd keeps, those of `given` not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


def test_half_of_what_eager_keeps_beside_the_input_or_nothing() -> None:
    args = mlp(make("gate_up", True, torch.float32, bias=False), torch.float32, bias=False)
    given = leaves_of(args)
    rows = 6
    assert kept(lambda: mlp_reference(*args), given) == 4 * HIDDEN * rows
    assert kept(lambda: OPS.gated_mlp(*args), given) == 2 * HIDDEN * rows
    assert kept(lambda: OPS.gated_mlp.recompute(*args), given) == 0


@pytest.mark.parametrize("overload", ["default", "recompute"])
@pytest.mark.parametrize(("order", "separate"), FORMS[:3])
def test_norm_in_front_is_computed_again(order: str, separate: bool, overload: str) -> None:
    _, weights, *rest = args = mlp(make(order, separate, torch.float64, bias=False), torch.float64, bias=False)
    before, norm_weight = leaf(6, DIM, dtype=torch.float64), leaf(DIM, dtype=torch.float64)

    def block(before: Tensor, norm_weight: Tensor, down: Tensor, *given: Tensor, again: bool = True) -> Tensor:
        y = OPS.rms_norm(before, norm_weight, 1e-6, 1.0)
        options = ("silu", None, 1.0, 0.0, before, norm_weight, 1e-6, 1.0) if again else ()
        return getattr(OPS.gated_mlp, overload)(y, [*given], rest[0], order, down, None, *options)

    tensors = (before, norm_weight, args[4], *weights)
    assert torch.autograd.gradcheck(block, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(block, tensors, fast_mode=True)
    numbers = [kept(lambda again=again: block(*tensors, again=again), tensors) for again in (False, True)]
    assert numbers[0] - numbers[1] == 6 * DIM


def test_packed_weights_are_taken_apart_as_views() -> None:
    for order in ORDERS:
        packed, bias = torch.randn(2 * HIDDEN, DIM), torch.randn(2 * HIDDEN)
        gate, up, gate_bias, up_bias = split_gate_up([packed], [bias], order)
        storages = {item.untyped_storage().data_ptr() for item in (packed, gate, up)}
        assert len(storages) == 1 and gate.stride(1) == up.stride(1) == 1
        assert gate_bias is not None and up_bias is not None
        assert torch.equal(joined(gate, up, order, 0), packed)
        assert torch.equal(joined(gate_bias, up_bias, order, 0), bias)


def expert_args(order: str, separate: bool, transposed: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x, weights, offsets, order: three experts, the second without rows; transposed: [E, F, D] in memory."""
    sizes = (HIDDEN, HIDDEN) if separate else (2 * HIDDEN,)
    shapes = [(3, size, 8) if transposed else (3, 8, size) for size in sizes]
    weights = [leaf(*shape, dtype=dtype) for shape in shapes]
    weights = [weight.transpose(1, 2) if transposed else weight for weight in weights]
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)
    return leaf(9, 8, dtype=dtype), [w.detach().requires_grad_() for w in weights], offsets, order


def expert_reference(x: Tensor, weights: Sequence[Tensor], offsets: Tensor, order: str) -> Tensor:
    ends = [0, *offsets.tolist()]
    parts = [
        reference(x[start:end], [weight[i].t() for weight in weights], [None] * len(weights), order, "silu")
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("order", "separate"), FORMS)
def test_experts(order: str, separate: bool, transposed: bool) -> None:
    args = expert_args(order, separate, transposed)
    for overload in ("default", "inline", "parts"):
        check(getattr(OPS.grouped_linear_swiglu, overload), expert_reference, args)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("order", "separate"), FORMS)
def test_experts_of_as_many_rows_each(order: str, separate: bool, transposed: bool) -> None:
    x, weights, _, _ = expert_args(order, separate, transposed)
    batches = x.detach().unflatten(0, (3, 3)).requires_grad_()

    def by_ends(x: Tensor, weights: Sequence[Tensor], offsets: None, order: str) -> Tensor:
        ends = torch.tensor([3, 6, 9], dtype=torch.int32)
        return expert_reference(x.flatten(0, 1), weights, ends, order).unflatten(0, (3, 3))

    for overload in ("default", "inline", "parts"):
        check(getattr(OPS.grouped_linear_swiglu, overload), by_ends, (batches, weights, None, order))


def test_opcheck_passes() -> None:
    for order, separate in (("gate_up", True), ("interleaved", False)):
        args = make(order, separate, torch.float32)
        opcheck(OPS.linear_swiglu.default, (*args, "gelu_tanh"))
        opcheck(OPS.gated_mlp.default, mlp(args, torch.float32))
        opcheck(OPS.gated_mlp.recompute, mlp(args, torch.float32))
        x, weights, *rest = expert_args(order, separate, True, torch.bfloat16)
        opcheck(OPS.grouped_linear_swiglu.default, (x, weights, *rest))
        batches = x.detach().unflatten(0, (3, 3)).requires_grad_()
        opcheck(OPS.grouped_linear_swiglu.default, (batches, weights, None, order))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_results_have_the_strides_of_their_fakes(leading: tuple[int, ...]) -> None:
    x, dy = (torch.randn(*leading, 2 * DIM)[..., ::2] for _ in range(2))
    gate_up = torch.randn(*leading, 2 * HIDDEN)
    gate, up, down = torch.randn(HIDDEN, DIM), torch.randn(HIDDEN, DIM), torch.randn(DIM, HIDDEN)
    packed = torch.randn(2 * HIDDEN, DIM)
    flags = ("silu", None, 1.0, 0.0)
    assert_same_layouts(
        [
            (OPS.linear_swiglu_fwd, (x, [gate, up], [None, None], "gate_up", *flags)),
            (OPS.linear_swiglu_fwd, (x, [packed], [None], "interleaved", *flags)),
            (OPS.linear_gated_bwd, (dy, down, gate_up, *flags, True)),
            (OPS.linear_gated_bwd, (dy, down, gate_up, *flags, False)),
            (OPS.recomputed_gated_bwd, (dy, x, [packed], [None], "up_gate", down, *flags, True)),
            (OPS.rms_norm_again, (dy, x, None, 1e-6)),
            (OPS.linear_pair, (gate_up, packed[::2], packed[1::2])),
        ]
    )


def test_weights_and_orders_that_do_not_fit_are_refused() -> None:
    x, weight, odd = torch.ones(3, 8), torch.ones(4, 8), torch.ones(5, 8)
    with pytest.raises(ValueError, match="order: got 'up_first', expected one of .*'up_gate'"):
        OPS.linear_swiglu(x, [weight], [None], "up_first")
    with pytest.raises(ValueError, match="order: got 'up_gate', expected 'gate_up' for two weights"):
        OPS.linear_swiglu(x, [weight, weight], [None, None], "up_gate")
    with pytest.raises(ValueError, match="weights: got 3, expected gate and up, or one packed"):
        OPS.linear_swiglu(x, [weight] * 3, [None] * 3, "gate_up")
    with pytest.raises(ValueError, match="weights: got 5 packed rows, expected an even number"):
        OPS.linear_swiglu(x, [odd], [None], "gate_up")
    with pytest.raises(ValueError, match="up: size of dimension 0: got 5, expected 4"):
        OPS.gated_mlp(x, [weight, odd], [None, None], "gate_up", torch.ones(8, 4), None)
    with pytest.raises(ValueError, match="weight: size of dimension 1: got 3, expected 4"):
        OPS.gated_mlp(x, [weight, weight], [None, None], "gate_up", torch.ones(8, 3), None)
    with pytest.raises(TypeError, match="x torch.float32, weight torch.bfloat16"):
        OPS.linear_swiglu(x, [weight.bfloat16()], [None], "gate_up")
    with pytest.raises(TypeError, match="offsets: got dtype torch.int64, expected torch.int32"):
        OPS.grouped_linear_swiglu(x, [torch.ones(2, 8, 4)], torch.tensor([1, 3]), "gate_up")
    with pytest.raises(ValueError, match="weight: size of dimension 0: got 2, expected 1"):
        OPS.grouped_linear_swiglu(x, [torch.ones(2, 8, 4)], torch.tensor([3], dtype=torch.int32), "gate_up")
    with pytest.raises(ValueError, match=r"x: got 2 dimensions \(3, 8\), expected 3"):
        OPS.grouped_linear_swiglu(x, [torch.ones(2, 8, 4)], None, "gate_up")
    with pytest.raises(ValueError, match="weight: size of dimension 0: got 2, expected 3"):
        OPS.grouped_linear_swiglu(x.view(3, 1, 8), [torch.ones(2, 8, 4)], None, "gate_up")
