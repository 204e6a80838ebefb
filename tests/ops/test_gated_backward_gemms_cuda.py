"""infuse::linear_pair_out and infuse::linear_gated_backward_out, the GEMMs of a gated MLP's gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from infuse.ops import library
from infuse.ops.gated_backward_kernels import ACTIVATIONS, GEMMS, can_differentiate_linear, can_multiply_pair
from infuse.ops.swiglu import swiglu_bwd_ref, swiglu_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16 = torch.bfloat16, torch.float16
# R, D, F
SHAPES = ((1, 8, 8), (128, 256, 64), (129, 264, 72), (300, 1000, 1544), (1024, 512, 768), (515, 2048, 136))
SUM_ERROR = 4e-6  # of sums in fp32, relative to the sum of all magnitudes
OPS = torch.ops.infuse


@pytest.fixture(autouse=True)
def _needs_wgmma() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def configs() -> range:
    return range(-1, len(library.configurations(GEMMS)))


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).to(dtype)


def run_pair(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor, config: int = -1) -> Tensor:
    dx = dgate_up.new_full((dgate_up.shape[0], gate_weight.shape[1]), math.nan)
    OPS.linear_pair_out(dgate_up, gate_weight, up_weight, config, dx)
    return dx


def check_pair(dgate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> None:
    assert can_multiply_pair(dgate_up, gate_weight, up_weight) == ""
    weights = torch.cat((gate_weight, up_weight)).double()
    exact = dgate_up.double() @ weights
    bound = 0.51 * torch.finfo(dgate_up.dtype).eps * exact.abs() + SUM_ERROR * (dgate_up.double().abs() @ weights.abs())
    for config in configs():
        got = run_pair(dgate_up, gate_weight, up_weight, config)
        assert ((got.double() - exact).abs() <= bound).all(), f"configuration {config}"
        assert torch.equal(run_pair(dgate_up, gate_weight, up_weight, config), got), f"configuration {config}"


def run_gated(dy: Tensor, weight: Tensor, gate_up: Tensor, activation: str, config: int = -1) -> tuple[Tensor, Tensor]:
    rows, dim = dy.shape[0], weight.shape[1]
    results = gate_up.new_full((rows, 2 * dim), math.nan), gate_up.new_full((rows, dim), math.nan)
    OPS.linear_gated_backward_out(dy, weight, gate_up, activation, config, *results)
    return results


def check_gated(dy: Tensor, weight: Tensor, gate_up: Tensor, activation: str) -> None:
    """dh is rounded before it is used, as it is where it is written."""
    assert can_differentiate_linear(dy, weight, gate_up, activation) == ""
    eps = torch.finfo(dy.dtype).eps
    gate, up = gate_up.double().chunk(2, -1)
    dh = dy.double() @ weight.double()
    exact = torch.cat(swiglu_bwd_ref(dh, gate, up, activation, None, 1.0, 0.0), -1)
    slopes = torch.cat((up, gate), -1).abs() * 1.2
    magnitudes = (dy.double().abs() @ weight.double().abs()).repeat(1, 2) * slopes
    bound = 1.05 * eps * exact.abs() + SUM_ERROR * magnitudes + torch.finfo(dy.dtype).tiny * (1 + slopes)
    gate_again, up_again = gate_up.chunk(2, -1)
    out_bound = 1.05 * eps * (gate * up).abs()
    for config in configs():
        got = run_gated(dy, weight, gate_up, activation, config)
        assert ((got[0].double() - exact).abs() <= bound).all(), f"configuration {config}"
        out = swiglu_ref(gate_again, up_again, activation).double()
        assert ((got[1].double() - out).abs() <= out_bound + torch.finfo(dy.dtype).tiny).all()
        again = run_gated(dy, weight, gate_up, activation, config)
        assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1]), f"configuration {config}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_pair(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, dim, features = shape
    inputs = [random(rows, 2 * features, dtype=dtype), *(random(features, dim, dtype=dtype, scale=0.1) for _ in "gu")]
    copies = [tensor.clone() for tensor in inputs]
    check_pair(*inputs)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies))


def test_pair_of_views() -> None:
    dgate_up = random(200, 320)[:, :288]
    packed = random(288, 264, scale=0.1)
    check_pair(dgate_up, packed[:144], packed[144:])
    check_pair(dgate_up, packed[0::2], packed[1::2])
    check_pair(dgate_up, random(144, 400)[:, 8:272], packed[:144])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(shape: tuple[int, int, int], dtype: torch.dtype, activation: str) -> None:
    rows, dim, features = shape
    inputs = random(rows, dim, dtype=dtype), random(dim, features, dtype=dtype, scale=0.1), random(rows, 2 * features)
    inputs = *inputs[:2], inputs[2].to(dtype)
    copies = [tensor.clone() for tensor in inputs]
    check_gated(*inputs, activation)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies))


def test_gated_of_views_and_without_the_product() -> None:
    dy, weight, gate_up = random(150, 200)[:, 8:144], random(136, 320)[:, 8:296], random(150, 600)[:, 16:592]
    check_gated(dy, weight, gate_up, "silu")
    dgate_up = gate_up.new_full(gate_up.shape, math.nan)
    OPS.linear_gated_backward_out(dy, weight, gate_up, "silu", -1, dgate_up, None)
    assert torch.equal(dgate_up, run_gated(dy, weight, gate_up, "silu")[0])


def test_many_tiles_for_each_cta() -> None:
    check_pair(random(2500, 256), random(128, 4096, scale=0.1), random(128, 4096, scale=0.1))
    check_gated(random(2500, 64), random(64, 5000, scale=0.1), random(2500, 10000), "silu")


def test_nan_stays_in_its_row() -> None:
    dy, weight, gate_up = random(140, 64), random(64, 264), random(140, 528)
    dy[3, 5] = math.nan
    dgate_up, out = run_gated(dy, weight, gate_up, "silu")
    assert dgate_up[3].isnan().all() and not dgate_up[4:].isnan().any() and not out.isnan().any()
    dgate_up = random(140, 128)
    dgate_up[130, 100] = math.inf
    dx = run_pair(dgate_up, random(64, 264), random(64, 264))
    assert dx[130].isinf().all() and dx[:130].isfinite().all() and dx[131:].isfinite().all()


def test_no_rows_and_no_columns() -> None:
    assert run_pair(random(0, 16), random(8, 8), random(8, 8)).shape == (0, 8)
    assert run_gated(random(0, 8), random(8, 16), random(0, 32), "silu")[0].shape == (0, 32)
    assert run_gated(random(3, 8), random(8, 0), random(3, 0), "silu")[1].shape == (3, 0)


def test_the_forms_that_allocate() -> None:
    dy, weight, gate_up = random(24, 40), random(40, 48), random(24, 96)
    expected = run_gated(dy, weight, gate_up, "gelu_tanh")
    odd = random(24 * 40 + 1)[1:].view(2, 12, 40).copy_(dy.view(2, 12, 40))
    got = OPS.linear_gated_backward(odd, weight, gate_up.view(2, 12, 96), "gelu_tanh", True, -1)
    assert got[0].shape == (2, 12, 96) and all(torch.equal(a, b.view(a.shape)) for a, b in zip(got, expected))
    weights = random(48, 40), random(48, 40)
    dx = OPS.linear_pair_product(expected[0].view(2, 12, 96), *weights, -1)
    assert dx.shape == (2, 12, 40) and torch.equal(dx.view(24, 40), run_pair(expected[0], *weights))
    torch.library.opcheck(OPS.linear_gated_backward.default, (dy, weight, gate_up, "silu", False, -1))
    torch.library.opcheck(OPS.linear_pair_product.default, (expected[0], *weights, -1))


def test_captured_in_a_graph() -> None:
    dy, weight, gate_up = random(300, 64), random(64, 512), random(300, 1024)
    expected = run_gated(dy, weight, gate_up, "silu")
    results = [torch.full_like(tensor, math.nan) for tensor in expected]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.linear_gated_backward_out(dy, weight, gate_up, "silu", -1, *results)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_what_the_kernels_cannot_take_is_an_error() -> None:
    dgate_up, weight, dx = random(4, 32), random(16, 24), random(4, 24)
    odd = random(4 * 32 + 1)[1:].view(4, 32)
    for arguments, message in (
        ((dgate_up.float(), weight, weight, -1, dx), "dtype of dgate_up"),
        ((dgate_up, weight, weight[:8], -1, dx), "shape of up_weight"),
        ((dgate_up, weight.mT.contiguous().mT, weight, -1, dx), "stride of the last dimension of gate_weight"),
        ((odd, weight, weight, -1, dx), "address of dgate_up"),
        ((dgate_up[:, :24], weight[:12], weight[:12], -1, dx), "expected multiples of 16 and 8"),
        ((dgate_up, weight, weight, 99, dx), "config, got 99"),
        ((dgate_up, weight, weight, -1, dx[:, :16]), "shape of dx"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.linear_pair_out(*arguments)
