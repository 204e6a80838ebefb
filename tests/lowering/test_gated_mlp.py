"""A gated MLP that trains: which kernels its two passes run in, and what lives between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infuse
from infuse.lowering import decisions, gated_mlp, inductor
from infuse.lowering.heuristics import H200
from infuse.lowering.heuristics import linears as heuristics
from infuse.lowering.policy import place
from infuse.ops import gated_mlp as _operator  # noqa: F401, defines it
from infuse.ops import library, linear_kernels
from infuse.settings import Settings
from tests.lowering import pretended_linears as pretended

DIM, HIDDEN = 16, 24
PIECES = ("linear_swiglu_fwd", "linear_gated_bwd", "linear_pair")


@pytest.fixture
def calls(implement_on_cpu: Callable[[str, Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called."""
    found: list[str] = []

    def implement(name: str, run: Callable[..., None]) -> None:
        def call(*args: Any) -> None:
            found.append(name)
            run(*args)

        implement_on_cpu(f"{name}_out", call)

    implement("gated_linear", pretended.gated_on_cpu)
    implement("gated_backward", pretended.gated_backward_on_cpu)
    implement("linear_gated_backward", pretended.linear_gated_backward_on_cpu)
    implement("linear_pair", pretended.linear_pair_on_cpu)
    implement_on_cpu("linear_swiglu_fwd_kernel", linear_kernels.run_forward)
    implement_on_cpu("linear_swiglu_kernel", linear_kernels.implementation(linear_kernels.KINDS["linear_swiglu"]))
    monkeypatch.setattr(library, "capability", lambda device: H200)
    return found


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """With a norm before it and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(DIM, eps=1e-6), MLP()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm(x))
        return out


def trained(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The result and the gradients of x and all parameters."""
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    out = function(leaves[0])  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def compiled_alike(x: Tensor, **settings: Any) -> dict[str, str]:
    """What was chosen for each piece; asserts that results and gradients are the module's own."""
    decisions.clear()
    torch._dynamo.reset()
    module = MLP().bfloat16()
    with infuse.override(**settings):
        found = trained(torch.compile(module, backend="infuse", fullgraph=True), module, x)
    for got, right in zip(found, trained(module, module, x), strict=True):
        torch.testing.assert_close(got, right, atol=5e-2, rtol=5e-2)
    return {decision.op: decision.chosen for decision in decisions.decisions()}


@pytest.mark.parametrize("memory", ["gate_up", "recompute"])
def test_what_lives_between_the_passes_is_at_most_half_of_what_eager_keeps(
    calls: list[str], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "trains", lambda sizes, capability: True)
    module, x = Block().bfloat16(), torch.randn(80, DIM).bfloat16().requires_grad_()
    rows, saved = 80, {}

    def counted(function: Callable[[Tensor], Tensor]) -> float:
        """Elements a row, of what is neither an argument nor a parameter."""
        given = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in given:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(x)
        found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / 2 / rows
        out.sum().backward()
        return found

    eager = counted(module)
    with infuse.override(mlp_memory=memory):
        fused = counted(torch.compile(module, backend="infuse", fullgraph=True))
    # Of a row gate and up, and two float32 for the norm at most.
    assert fused <= (2 * HIDDEN + 4 if memory == "gate_up" else 4)
    assert fused <= eager / 2


@pytest.mark.parametrize("memory", ["gate_up", "recompute"])
def test_both_passes_run_in_kernels(calls: list[str], memory: str) -> None:
    x = torch.randn(2, 40, DIM).bfloat16()
    chosen = compiled_alike(x, kernels="always", mlp_memory=memory)
    forwards = ["gated_linear"] * (2 if memory == "recompute" else 1)
    assert sorted(calls) == sorted([*forwards, "linear_gated_backward", "linear_pair"])
    assert {piece: chosen[piece] for piece in PIECES} == {
        "linear_swiglu_fwd": "kernel_-1",
        "linear_gated_bwd": "kernel_-1",
        "linear_pair": "kernel_-1",
    }


def test_where_the_gemms_have_no_kernel_the_pass_has_one(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "capability", lambda device: (8, 0))
    chosen = compiled_alike(torch.randn(2, 40, DIM).bfloat16(), kernels="always")
    assert calls == ["gated_linear", "gated_backward"]
    assert chosen["linear_gated_bwd"] == chosen["linear_pair"] == gated_mlp.PRODUCTS


def test_max_autotune_measures_every_piece(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    timed: dict[str, set[str]] = {}

    def measure(name: str, kernels: Any, formulas: Any, *rest: Any, tune_products: bool) -> dict[str, float]:
        assert tune_products
        timed[name] = {*kernels, *formulas}
        return {gated_mlp.PRODUCTS: 1.0, "kernel_1": 0.9 if name == "infuse_linear_pair" else 1.1}

    monkeypatch.setattr(inductor, "measure", measure)
    monkeypatch.setattr(heuristics, "trains", lambda sizes, capability: True)
    x = torch.randn(2, 40, DIM).bfloat16()
    module = MLP().bfloat16()
    found = trained(torch.compile(module, backend="infuse", mode="max-autotune-no-cudagraphs"), module, x)
    for got, right in zip(found, trained(module, module, x), strict=True):
        torch.testing.assert_close(got, right, atol=5e-2, rtol=5e-2)
    candidates = {gated_mlp.PRODUCTS, "kernel_-1", "kernel_0", "kernel_1"}
    assert timed == {f"infuse_{piece}": candidates for piece in PIECES}
    assert calls == ["gated_backward", "linear_pair"]


def test_the_policy_leaves_a_gated_mlp_to_its_parts(calls: list[str]) -> None:
    """Where nothing is trained, few rows are, and where no kernel takes it."""

    def form(rows: int, *flags: Any, training: bool = True, **settings: Any) -> str:
        x, gate, up = (torch.empty(size, 2048, dtype=torch.bfloat16, device="meta") for size in (rows, 8192, 8192))
        args = (x, [gate, up], [None, None], "gate_up", gate.t(), None, *flags)
        found = place("gated_mlp", args, training, settings=Settings(**settings), max_autotune=True)
        return found.overload or found.declined

    assert form(8192) == "default" and form(8192, mlp_memory="recompute") == "recompute"
    assert form(8, kernels="always") == "default"
    assert "as fast" in form(80)
    assert "gradients" in form(8192, training=False)
    assert "off" in form(8192, kernels="never")
    assert "exact" in form(8192, kernels="always", numerics="exact")
    assert "limits" in form(8192, "quick_gelu", 7.0, 1.702, 1.0)
    assert "mish" in form(8192, "mish")
