"""Capture a function as torch.compile does, rewrite the graph, and run original and rewritten graph eagerly.

No code is generated: what is tested is the rewrite, not Inductor.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infuse.patterns.emit import same_strides
from infuse.patterns.passes import rewrite
from infuse.report import Placement, SiteRecord
from infuse.settings import Settings
from tests.tolerances import assert_close_to_fp64

# (dtype, training, dynamic shapes): each spelling is tried in these.
MODES = (
    (torch.float32, False, False),
    (torch.bfloat16, True, False),
    (torch.float32, True, True),
    (torch.bfloat16, False, True),
)


# Kinds that the lowering takes only where a kernel for them pays.
NEED_KERNELS = (
    *("qk_norm_rope", "rope_cache_write", "norm_linear", "packed_linear", "linear_swiglu", "norm_linear_swiglu"),
    *("linear_add", "gated_mlp", "grouped_linear_swiglu", "embedding"),
)


def default_overload(kind: str, examples: tuple[object, ...], training: bool) -> Placement:
    drops_out = kind == "attention" and examples[9] != 0.0
    return _declined(kind) or Placement("inline" if drops_out else "default", "reference")


def inline_overload(kind: str, examples: tuple[object, ...], training: bool) -> Placement:
    return _declined(kind) or Placement("inline", "decomposition")


def composite_overload(kind: str, examples: tuple[object, ...], training: bool) -> Placement:
    """As if there were a kernel for everything."""
    return Placement("default", "reference")


def composites(*kinds: str) -> Callable[..., Placement]:
    """As if there were kernels for these alone, of those that need some."""

    def place(kind: str, examples: tuple[object, ...], training: bool) -> Placement:
        return (
            composite_overload(kind, examples, training)
            if kind in kinds
            else default_overload(kind, examples, training)
        )

    return place


def _declined(kind: str) -> Placement | None:
    return Placement("", "", declined="no kernel") if kind in NEED_KERNELS else None


@dataclass
class Captured:
    """A captured graph before and after the rewrite; inputs in the order of the graph's placeholders; its remarks."""

    original: torch.fx.GraphModule
    rewritten: torch.fx.GraphModule
    records: list[SiteRecord]
    inputs: tuple[Any, ...]
    notes: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """How many sites were rewritten, by kind, read from the rewritten graph."""
        names = [str(getattr(node.target, "overloadpacket", "")) for node in self.rewritten.graph.nodes]
        return dict(Counter(name.removeprefix("infuse.") for name in names if name.startswith("infuse.")))

    @property
    def refusals(self) -> list[str]:
        return [record.reason for record in self.records if record.status == "refused"]

    @property
    def spellings(self) -> list[str]:
        return [record.spelling for record in self.records if record.status == "rewritten"]

    def operators(self) -> list[torch.fx.Node]:
        return [node for node in self.rewritten.graph.nodes if str(node.target).startswith("infuse.")]

    def targets(self) -> set[str]:
        """Names of what the rewritten graph calls."""
        return {str(getattr(node.target, "__name__", node.target)) for node in self.rewritten.graph.nodes}


def capture(
    function: Callable[..., Any],
    *args: Any,
    dynamic: bool = False,
    training: bool = False,
    settings: Settings | None = None,
    place: Callable[..., Placement] = default_overload,
    before: Callable[[torch.fx.Graph], None] | None = None,
    **kwargs: Any,
) -> Captured:
    """Compiles `function` with a backend that rewrites the graph. before: changes the graph ahead of the rewrite."""
    found: list[Captured] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if before is not None:
            before(module.graph)
            module.recompile()
        original = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
        notes: list[str] = []
        records = rewrite(module.graph, settings or Settings(), place, training, note=notes.append)
        module.graph.lint()
        module.recompile()
        unread = [node for node in module.graph.nodes if str(node.target).startswith("infuse.") and not node.users]
        dead = [node for node in original.graph.nodes if node.op.startswith("call") and not node.users]
        assert len(unread) <= len(dead), f"nothing reads what the rewrite put there: {unread}"

        def run(*values: Any) -> Any:
            found.append(Captured(original, module, records, values, notes))
            return original(*_cloned(values))

        return run

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    assert len(found) == 1
    return found[0]


def _cloned(values: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Fresh leaves, so that gradients and in-place updates of one run do not reach another."""
    result = []
    for value in values:
        if isinstance(value, Tensor):
            wide = value.dtype if dtype is None or not value.is_floating_point() else dtype
            fresh = value.detach().to(wide, copy=True)
            value = fresh.requires_grad_(value.requires_grad)
        result.append(value)
    return result


def results(module: torch.fx.GraphModule, values: Sequence[Any], training: bool) -> list[Tensor]:
    """Outputs, and in training the gradients of a weighted sum of them with respect to the inputs."""
    leaves = _cloned(values)
    with torch.set_grad_enabled(training):
        outputs = [output for output in module(*leaves) if isinstance(output, Tensor)]
    if not training:
        return outputs
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (output.float() * torch.randn(output.shape, generator=generator)).sum()
        for output in outputs
        if output.requires_grad
    )
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    return [*outputs, *(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, wanted))]


def assert_same_results(captured: Captured, training: bool = False) -> None:
    """Outputs, in training gradients too: dtypes, shapes and layout as the original's, and as near to float64."""
    before = results(captured.original, captured.inputs, training)
    after = results(captured.rewritten, captured.inputs, training)
    exact = results_in_float64(captured, training)
    assert len(before) == len(after) == len(exact)
    num_outputs = sum(isinstance(output, Tensor) for output in captured.original(*_cloned(captured.inputs)))
    for i, (old, new, reference) in enumerate(zip(before, after, exact)):
        # Nothing relies on a gradient's strides.
        assert i >= num_outputs or same_strides(old, new), f"output {i}: got {new.stride()}, expected {old.stride()}"
        if old.is_floating_point():
            assert_close_to_fp64(new, old, reference)
        else:
            assert torch.equal(old, new)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def results_in_float64(captured: Captured, training: bool) -> list[Tensor]:
    """The original in float64: its casts between floats go to float64, as copies still, and its inputs are widened."""
    wide = copy.deepcopy(captured.original).double()
    for node in wide.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, _widened)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _widened)
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16", "to", "type_as"):
            before, after = (n.meta["example_value"] for n in (node.args[0], node))
            if before.dtype != after.dtype and before.is_floating_point() and after.is_floating_point():
                node.target, node.args, node.kwargs = "to", (node.args[0], torch.float64), {"copy": True}
            elif node.target in ("float", "half", "bfloat16"):
                node.target = "double"
    wide.recompile()
    values = [
        value.detach().double().requires_grad_(value.requires_grad) if _is_float(value) else value
        for value in captured.inputs
    ]
    return results(wide, values, training)


def _widened(argument: Any) -> Any:
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if argument in narrow and isinstance(argument, torch.dtype) else argument


def parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in a dtype, with parameters that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.5 + 0.5).to(dtype)
    return module
