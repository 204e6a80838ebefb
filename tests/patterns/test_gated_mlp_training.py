"""What a trained block keeps for its backward once its MLP is one operator, through AOTAutograd's partitioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from infuse.patterns.passes import rewrite
from infuse.report import Placement
from infuse.settings import Settings
from tests.patterns.capture import default_overload

ROWS, DIM, HIDDEN = 24, 32, 112


class Block(nn.Module):
    """Norm, gated MLP, residual. packed: gate and up in one weight, up first."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM, eps=1e-6)
        sizes = (2 * HIDDEN,) if packed else (HIDDEN, HIDDEN)
        self.projections = nn.ModuleList([nn.Linear(DIM, size, bias=False) for size in sizes])
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        found = [projection(y) for projection in self.projections]
        up, gate = found[0].chunk(2, -1) if len(found) == 1 else found[::-1]
        return x + self.down(F.silu(gate) * up)


class Compiled:
    """A function rewritten and taken through AOTAutograd; forward and backward run eagerly.

    overload: of gated_mlp. add_norms: those of a residual add are sites, whose backward is an operator.
    """

    def __init__(self, function: Callable[..., Any], overload: str, add_norms: bool = False) -> None:
        self.overload = overload
        self.patterns = ("rms_norm", *(["add_rms_norm"] if add_norms else []), "swiglu", "gated_mlp")
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        self.run = torch.compile(function, backend=self._backend)

    def _place(self, kind: str, args: Sequence[object], training: bool) -> Placement:
        if kind == "gated_mlp" and self.overload:
            return Placement(self.overload, "reference")
        return Placement("inline", "formula") if kind == "rms_norm" else default_overload(kind, (*args,), training)

    def _backend(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                rewrite(part.graph, Settings(patterns=self.patterns), self._place, training=True)
                part.recompile()
        keep = aot_autograd(
            fw_compiler=self._keeps(self.forward),
            bw_compiler=self._keeps(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        compiled: Callable[..., Any] = keep(module, inputs)
        return compiled

    def _keeps(self, graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    def called(self, graphs: list[torch.fx.GraphModule]) -> list[str]:
        """Operators of Infuse and products, in order."""
        names = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
        return [name for name in names if name.startswith(("infuse", "aten.mm", "aten.addmm"))]


def kept(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, int]:
    """(result, numbers that are saved for the backward, weights and the input not counted)"""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *parameters)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(x)
    return result, sum(saved.values())


def gradients(result: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(result.square().sum(), [x, *module.parameters()]))


# What the forward and the backward of each overload call, beside products with weights' gradients as their results.
INSIDE = {
    "default": (["infuse.linear_swiglu_fwd.default"], "infuse.linear_gated_bwd.default"),
    "recompute": (["infuse.linear_swiglu.default"], "infuse.recomputed_gated_bwd.default"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("overload", INSIDE)
def test_half_of_eagers_activations_or_less_is_kept(overload: str, packed: bool) -> None:
    module, x = Block(packed), torch.randn(ROWS, DIM, requires_grad=True)
    parameters = list(module.parameters())
    result, eagers = kept(module, x, parameters)
    expected = [result, *gradients(result, x, module)]
    compiled = Compiled(module, overload)
    result, ours = kept(compiled.run, x, parameters)
    torch.testing.assert_close([result, *gradients(result, x, module)], expected)
    gates = 2 * HIDDEN if overload == "default" else 0
    statistics = ROWS
    assert ours == ROWS * gates + statistics
    assert 2 * ours <= eagers
    forward, backward = INSIDE[overload]
    assert compiled.called(compiled.forward) == [*forward, "aten.mm.default"]
    names = compiled.called(compiled.backward)
    assert (
        names.count("infuse.rms_norm_again.default") == 1
        and names.count(backward) == 1
        and names.count("infuse.linear_pair.default") == 1
    )
    assert names.count("aten.mm.default") == (2 if packed else 3)


def test_norm_whose_input_is_written_to_keeps_its_result() -> None:
    class Writing(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = x.sin()
            y = self.norm(h)
            with torch.no_grad():
                self.norm.weight.mul_(1.0)
            return self.down(F.silu(self.projections[0](y)) * self.projections[1](y))

    compiled = Compiled(Writing(), "default")
    compiled.run(torch.randn(ROWS, DIM)).sum().backward()
    assert "infuse.rms_norm_again.default" not in compiled.called(compiled.backward)
    assert "infuse.linear_gated_bwd.default" in compiled.called(compiled.backward)


def test_checkpointed_block_keeps_its_input_alone() -> None:
    module, x = Block(), torch.randn(ROWS, DIM, requires_grad=True)
    expected = gradients(module(x), x, module)
    compiled = Compiled(lambda x: checkpoint(module, x, use_reentrant=False), "default")
    result, ours = kept(compiled.run, x, list(module.parameters()))
    assert ours == 0
    torch.testing.assert_close(gradients(result, x, module), expected)
    assert "infuse.linear_swiglu_fwd.default" in compiled.called(compiled.backward)


def test_operator_of_a_norm_behind_a_gated_mlp_costs_no_memory() -> None:
    """The sum that it normalises is saved in place of the MLP's result, as for the formula."""
    module, x = nn.Sequential(Block(), Block()), torch.randn(ROWS, DIM, requires_grad=True)
    parameters = list(module.parameters())
    formula, compiled = Compiled(module, "default"), Compiled(module, "default", add_norms=True)
    _, expected = kept(formula.run, x, parameters)
    result, ours = kept(compiled.run, x, parameters)
    assert ours == expected == 2 * (ROWS * 2 * HIDDEN + ROWS) + ROWS * DIM
    torch.testing.assert_close(gradients(result, x, module), gradients(module(x), x, module))
    assert compiled.called(compiled.backward).count("infuse.add_rms_norm_bwd.default") == 1
