"""infuse::gated_backward_out, the CUDA kernel of a gated activation's gradients: shapes, layouts, configurations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from infuse.ops import library
from infuse.ops.gated_backward_kernels import ACTIVATIONS, GATED_BACKWARD
from infuse.ops.swiglu import swiglu_bwd_ref, swiglu_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((1, 8), (3, 7), (5, 1), (17, 1000), (64, 1536), (300, 136), (2, 14336))


def configs() -> range:
    return range(-1, len(library.configurations(GATED_BACKWARD)))


def make(rows: int, dim: int, dtype: torch.dtype = BF16, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """dout and gate_up."""
    return tuple((scale * torch.randn(rows, n, device="cuda")).to(dtype) for n in (dim, 2 * dim))  # type: ignore[return-value]


def run(dout: Tensor, gate_up: Tensor, activation: str, config: int = -1) -> tuple[Tensor, Tensor]:
    """The kernel's answers, written over NaN."""
    dgate_up, out = gate_up.new_full(gate_up.shape, math.nan), dout.new_full(dout.shape, math.nan)
    torch.ops.infuse.gated_backward_out(dout, gate_up, activation, config, dgate_up, out)
    return dgate_up, out


def exact(dout: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.double().chunk(2, -1)
    gradients = swiglu_bwd_ref(dout.double(), gate, up, activation, None, 1.0, 0.0)
    return torch.cat(gradients, -1), swiglu_ref(gate, up, activation)


def check(dout: Tensor, gate_up: Tensor, activation: str) -> None:
    """Each number within what the roundings of its operands allow; no configuration gives other bits, ever."""
    unit = torch.finfo(dout.dtype).eps
    gate, up = gate_up.double().chunk(2, -1)
    # act and act' are good to about 2^-20 of the largest term of their sums, and rounded numbers to eps / 2.
    terms = torch.cat((dout.double() * up, dout.double() * gate), -1).abs() * 1.2
    first = run(dout, gate_up, activation)
    wanted = exact(dout, gate_up, activation)
    slack = torch.finfo(dout.dtype).tiny
    assert ((first[0].double() - wanted[0]).abs() <= unit / 2 * wanted[0].abs() + 2e-6 * terms + slack).all()
    # act is rounded before the product is.
    bound = 1.05 * unit * wanted[1].abs() + 2e-6 * (gate * up).abs() + slack * up.abs().clamp(min=1)
    assert ((first[1].double() - wanted[1]).abs() <= bound).all()
    for config in configs():
        for got, expected in zip(run(dout, gate_up, activation, config), first):
            assert torch.equal(got, expected), f"configuration {config}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_and_product(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    dout, gate_up = make(*shape, dtype)
    copies = dout.clone(), gate_up.clone()
    check(dout, gate_up, activation)
    assert torch.equal(dout, copies[0]) and torch.equal(gate_up, copies[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_small_numbers(activation: str) -> None:
    for scale in (1e-3, 50.0):
        check(*make(33, 264, scale=scale), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_are_where_the_formula_has_them(activation: str) -> None:
    dout, gate_up = make(4, 64, BF16)
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        gate_up[row, 5], gate_up[row, 70], dout[row, 9] = value, value, value
    dgate_up, out = run(dout, gate_up, activation)
    gate, up = gate_up.chunk(2, -1)
    wanted = torch.cat(swiglu_bwd_ref(dout, gate, up, activation, None, 1.0, 0.0), -1), swiglu_ref(gate, up, activation)
    for got, expected in zip((dgate_up, out), wanted):
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


def test_views_and_misaligned_addresses_give_the_same_bits() -> None:
    dout, gate_up = make(31, 72)
    expected = run(dout, gate_up, "silu")
    for shift in (1, 8):
        wide = [
            torch.randn(31, t.shape[1] + 16, device="cuda").to(BF16)[:, shift : t.shape[1] + shift]
            for t in (dout, gate_up)
        ]
        for view, tensor in zip(wide, (dout, gate_up)):
            view.copy_(tensor)
        assert all(torch.equal(a, b) for a, b in zip(run(wide[0], wide[1], "silu"), expected))
    one_row = dout[:1].expand(31, -1)
    assert all(
        torch.equal(a, b) for a, b in zip(run(one_row, gate_up, "silu"), run(one_row.contiguous(), gate_up, "silu"))
    )


def test_without_the_product_and_without_rows() -> None:
    dout, gate_up = make(9, 40)
    dgate_up = torch.full_like(gate_up, math.nan)
    torch.ops.infuse.gated_backward_out(dout, gate_up, "silu", -1, dgate_up, None)
    assert torch.equal(dgate_up, run(dout, gate_up, "silu")[0])
    for rows, dim in ((0, 8), (3, 0)):
        assert [tuple(t.shape) for t in run(*make(rows, dim), "silu")] == [(rows, 2 * dim), (rows, dim)]


def test_the_form_that_allocates_takes_leading_dimensions_and_any_strides() -> None:
    dout, gate_up = make(24, 48)
    expected = run(dout, gate_up, "gelu_erf")
    shaped = dout.view(2, 12, 48).transpose(0, 1).contiguous().transpose(0, 1), gate_up.view(2, 12, 96)
    for odd in (shaped[0], shaped[0].mT.contiguous().mT):
        got = torch.ops.infuse.gated_backward(odd, shaped[1], "gelu_erf", True, -1)
        assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(got, expected))
    torch.library.opcheck(torch.ops.infuse.gated_backward.default, (dout, gate_up, "silu", True, -1))


def test_captured_in_a_graph() -> None:
    dout, gate_up = make(100, 256)
    expected = run(dout, gate_up, "silu")
    results = [torch.full_like(t, math.nan) for t in expected]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.infuse.gated_backward_out(dout, gate_up, "silu", -1, *results)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_what_the_kernel_cannot_take_is_an_error() -> None:
    dout, gate_up = make(4, 16)
    dgate_up, out = torch.empty_like(gate_up), torch.empty_like(dout)
    for arguments, message in (
        ((dout.float(), gate_up, "silu", -1, dgate_up, out), "dtype of dout"),
        ((dout, gate_up[:, :16], "silu", -1, dgate_up, out), "shape of gate_up"),
        ((dout, gate_up, "relu", -1, dgate_up, out), "activation, got relu"),
        ((dout, gate_up, "silu", 99, dgate_up, out), "config, got 99"),
        ((dout, gate_up, "silu", -1, dgate_up.T.contiguous().T, out), "stride of the last dimension of dgate_up"),
        ((dout, gate_up, "silu", -1, dgate_up, out.half()), "dtype of out"),
        ((dout, gate_up, "silu", -1, dgate_up.expand(4, 32)[:, ::1].cpu(), out), "device of dgate_up"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.infuse.gated_backward_out(*arguments)
