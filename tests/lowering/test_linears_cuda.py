"""A decoder layer's linears through torch.compile on a GPU: kernels in the graph, against fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import infuse
from infuse.lowering import decisions
from tests.lowering.compiled import compiled_code

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

DIM, HIDDEN, KV_DIM = 256, 640, 64
KINDS = {"norm_linear", "norm_linear_swiglu", "linear_add"}


class Layer(nn.Module):
    """What a decoder layer has beside attention, for which an elementwise function stands. packed: gate and up."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM, eps=1e-6), nn.RMSNorm(DIM, eps=1e-6)
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, KV_DIM), nn.Linear(DIM, KV_DIM)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.packed = packed
        widths = [2 * HIDDEN] if packed else [HIDDEN, HIDDEN]
        self.gates = nn.ModuleList(nn.Linear(DIM, width, bias=False) for width in widths)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = self.q(y) * torch.cat((self.k(y), self.v(y)), -1).tanh().repeat(1, 1, DIM // (2 * KV_DIM))
        x = x + self.out(heads)
        y = self.norm2(x)
        if self.packed:
            up, gate = self.gates[0](y).chunk(2, -1)
        else:
            gate, up = (linear(y) for linear in self.gates)
        return x + self.down(F.silu(gate) * up)


def layer(packed: bool) -> Layer:
    torch.manual_seed(0)
    return Layer(packed=packed).cuda().bfloat16().eval()


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_few_rows_of_a_layer(rows: int, packed: bool) -> None:
    decisions.clear()
    module, x = layer(packed), torch.randn(1, rows, DIM, device="cuda").bfloat16()
    right = layer(packed).double()(x.double())
    with torch.no_grad(), infuse.override(kernels="always"):
        found = torch.compile(module, backend="infuse", fullgraph=True)(x)
        eager = module(x)
    assert error(found, right) <= 2 * error(eager, right)
    chosen = {decision.op: decision.chosen for decision in decisions.decisions() if decision.op in KINDS}
    assert chosen == dict.fromkeys(KINDS, "skinny_-1")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 77, 300])
def test_experts_of_as_many_rows_each(rows: int, packed: bool) -> None:
    decisions.clear()
    experts = 5
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * DIM**-0.5).bfloat16()

    def gated(x: Tensor, *weights: Tensor) -> Tensor:
        products = [torch.bmm(x, weight) for weight in weights]
        gate, up = products[0].chunk(2, -1) if len(products) == 1 else products
        return F.silu(gate) * up

    x = random(experts, rows, DIM)
    weights = [random(experts, DIM, 2 * HIDDEN)] if packed else [random(experts, DIM, HIDDEN) for _ in range(2)]
    with infuse.override(kernels="always"):
        found = torch.compile(gated, backend="infuse", fullgraph=True, dynamic=False)(x, *weights)
    right = gated(x.double(), *(weight.double() for weight in weights))
    assert error(found, right) <= 2 * error(gated(x, *weights), right)
    assert [decision.chosen for decision in decisions.decisions()] == ["gated_-1"]


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_in_cuda_graphs(mode: str) -> None:
    """The kernels start early there, each beside the end of the one before it. Triton's products take minutes."""
    module, compiled = layer(False), torch.compile(layer(False), backend="infuse", mode=mode)
    with torch.no_grad(), torch._inductor.config.patch(max_autotune_gemm_backends="ATEN"):
        for _ in range(5):
            x = torch.randn(1, 2, DIM, device="cuda").bfloat16()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), module(x), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_many_rows_take_one_kernel_for_gate_and_up(packed: bool) -> None:
    decisions.clear()
    module, x = layer(packed), torch.randn(2, 100, DIM, device="cuda").bfloat16()
    right = layer(packed).double()(x.double())
    with torch.no_grad(), infuse.override(kernels="always"):
        found = torch.compile(module, backend="infuse", fullgraph=True)(x)
        eager = module(x)
    assert error(found, right) <= 2 * error(eager, right)
    chosen: Any = [decision.chosen for decision in decisions.decisions() if decision.op == "linear_swiglu"]
    assert chosen == ["gated_-1"]


class Head(nn.Module):
    """A decoder's last norm and its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.logits = nn.RMSNorm(DIM, eps=1e-6), nn.Linear(DIM, 1000, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.norm(x))
        return logits


@pytest.mark.parametrize("rows", [1, 8, 16, 64])
def test_logits_are_written_in_float32(rows: int) -> None:
    torch.manual_seed(0)
    module, x = Head().cuda().bfloat16().eval(), torch.randn(rows, 1, DIM, device="cuda").bfloat16()
    with infuse.override(kernels="always"):
        found, code = compiled_code(lambda x: module(x).float(), x)
        narrow, _ = compiled_code(module, x)
    assert "infuse.norm_linear_kernel" in code and "@triton" not in code
    assert torch.equal(found, narrow.float())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("rows", [9, 16, 64])
def test_norms_between_kernels_are_split(rows: int, mode: str) -> None:
    """Two layers and a head: of five norms the four behind a kernel. Inputs of another size each time."""
    module = nn.Sequential(layer(False), layer(True), Head().cuda().bfloat16()).eval()
    exact = copy.deepcopy(module).double()
    with infuse.override(kernels="always"):
        for scale in (1.0, 1e-3, 100.0):
            x = torch.randn(rows, 1, DIM, device="cuda").bfloat16() * scale
            found, code = compiled_code(module, x, mode=mode)
            assert code.count("infuse.linear_add_scale.default(") == 4
            assert "infuse.linear_add_kernel" not in code and code.count("infuse.norm_linear_kernel.default(") == 1
            with torch.no_grad():
                right, eager = exact(x.double()), module(x)
            assert error(found, right) <= 2 * error(eager, right)
