"""Capture a function that makes a mask, and hold what is said of the mask against the mask itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from infuse.patterns import masks
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.index_algebra import Element, Linear, Symbol
from infuse.patterns.mask_views import linear
from infuse.patterns.masks import VANISHING, MaskFacts


class Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps every value; writes in place show in values that were kept before."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.kept[n] = super().run_node(n)
        return self.kept[n]


class Claim:
    """What is said of an output of a captured graph."""

    def __init__(self, module: torch.fx.GraphModule, view: CanonicalGraph, place: int = 0) -> None:
        self.module = module
        self.view = view
        self.place = place
        self.output = next(node for node in view.nodes if node.op == "output")
        mask = self.output.args[0][place]  # type: ignore[index]
        shape = list(self.view.shape(mask))
        self.shape = [*[1] * (4 - len(shape)), *shape]
        self.facts = masks.facts(self.view, mask, self.shape, [self.output])

    def check(self, inputs: Sequence[Any]) -> Tensor:
        """Asserts that the claims hold of the mask that these inputs give; returns the mask."""
        recorder = Recorder(self.module)
        mask: Tensor = recorder.run(*[x.clone() if isinstance(x, Tensor) else x for x in inputs])[self.place]
        placeholders = [node for node in self.view.nodes if node.op == "placeholder"]
        symbols = {
            node.meta["example_value"].node.expr: value
            for node, value in zip(placeholders, inputs)
            if isinstance(node.meta["example_value"], torch.SymInt)
        }
        full = mask.reshape([*[1] * (4 - mask.dim()), *mask.shape])
        assert_true_of(full, self.facts, lambda value: _number(value, symbols, recorder.kept))
        return mask

    def allows(self, *sizes: int) -> bool:
        """Whether the graph is valid for these sizes: the guards that came with it hold."""
        symbols: dict[Any, int] = {}
        guards: list[Any] = []
        for value, node in zip(self.inputs_of(*sizes), self.view.nodes):
            example = node.meta["example_value"]
            pairs = zip(example.shape, value.shape) if isinstance(example, Tensor) else [(example, value)]
            for size, number in pairs:
                if isinstance(size, torch.SymInt):
                    symbols[size.node._expr] = number  # a size that was fixed later has a symbol still
                    guards = size.node.shape_env.guards
        return all(bool(guard.expr.xreplace(symbols)) for guard in guards)

    def inputs_of(self, *sizes: int) -> list[Any]:
        """Inputs of other sizes, in the order in which the graph names its symbols, of small integers in floats."""
        remaining = iter(sizes)
        current: dict[str, int] = {}

        def size_of(size: int | torch.SymInt) -> int:
            known = linear(size)
            if known is not None and not known.terms:
                return known.constant
            if str(size) not in current:
                current[str(size)] = next(remaining)
            return current[str(size)]

        examples = [node.meta["example_value"] for node in self.view.nodes if node.op == "placeholder"]
        return [
            torch.randint(0, 3, [size_of(size) for size in example.shape]).to(example.dtype)
            if isinstance(example, Tensor)
            else size_of(example)
            for example in examples
        ]


def _number(value: Linear, symbols: dict[Any, Any], kept: dict[torch.fx.Node, Any]) -> int:
    total = value.constant
    for atom, factor in value.terms:
        if isinstance(atom, Symbol):
            total += factor * int(atom.expression.xreplace(symbols))
        else:
            assert isinstance(atom, Element) and atom.version == 0 and isinstance(atom.source, torch.fx.Node)
            place = tuple(_number(index, symbols, kept) for index in atom.indices)
            total += factor * int(kept[atom.source][place])
    return total


def assert_true_of(mask: Tensor, facts: MaskFacts, number: Callable[[Linear], int]) -> None:
    """Asserts each claim of `facts` for a mask [B, H, S, T]."""
    attended = mask if mask.dtype == torch.bool else ~(mask.double() <= VANISHING)
    rows, columns = torch.arange(mask.shape[2])[:, None], torch.arange(mask.shape[3])[None]
    bound = torch.ones(mask.shape[2:], dtype=torch.bool)
    if facts.upper is not None:
        bound = bound & (columns <= rows + number(facts.upper))
    if facts.lower is not None:
        bound = bound & (columns >= rows + number(facts.lower))
    if facts.chunk is not None:
        bound = bound & (columns // facts.chunk == rows // facts.chunk)
    assert not (attended & ~bound).any(), "a key outside of the bounds is attended to"
    if facts.all_true:
        assert attended.all() and (mask.dtype == torch.bool or not mask.any())
    if facts.exact:
        keys = attended.any(2, keepdim=True) if facts.padding else torch.ones((), dtype=torch.bool)
        assert torch.equal(attended, (bound & keys).expand_as(attended)), "the mask is more than is said"
        assert mask.dtype == torch.bool or not mask[attended].any()
    if facts.empty_rows is False:
        assert attended.any(-1).all()
    if facts.finite:
        assert mask.isfinite().all()
    if mask.dtype != torch.bool:
        assert facts.fills or not facts.exact or attended.all()


def claims(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> Claim:
    """The claims about a captured function's (first) result, checked with `args`."""
    return all_claims(function, *args, dynamic=dynamic)[0]


def all_claims(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> list[Claim]:
    """The claims about each of a captured function's results, checked with `args`."""
    found: list[tuple[torch.fx.GraphModule, tuple[Any, ...]]] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            found.append((module, values))
            return module(*[x.clone() if isinstance(x, Tensor) else x for x in values])

        return run

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    ((module, inputs),) = found
    view = CanonicalGraph(module.graph)
    outputs = next(node for node in view.nodes if node.op == "output").args[0]
    result = [Claim(module, view, place) for place in range(len(outputs))]  # type: ignore[arg-type]
    for claim in result:
        claim.check(inputs)
    return result
