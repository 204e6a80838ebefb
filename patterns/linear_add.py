"""A linear whose result is only added to a residual: the add becomes the epilogue of the product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.linears import read_linear
from infuse.patterns.sites import Site
from infuse.patterns.sizes import same_shape

KIND = "linear_add"


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """linear_add in place of each sum of a linear and a tensor of its shape that is none itself (as LoRA's is)."""
    for node in view.nodes:
        site = _join(view, node) if view.word(node) == "add" else None
        if site is not None:
            yield site


def _join(view: CanonicalGraph, total: Node) -> Site | None:
    operands = view.operands(total, "add")
    if operands is None:
        return None
    trails: tuple[list[Node], list[Node]] = ([], [])
    inner = [view.strip(operand, trail=trail) for operand, trail in zip(operands, trails)]
    linears = [read_linear(view, item) if isinstance(item, Node) else None for item in inner]
    found = [i for i in (0, 1) if linears[i] is not None]
    if len(found) != 1:
        return None
    (i,) = found
    linear, residual = linears[i], operands[1 - i]
    assert linear is not None
    own = (linear.node, *trails[i])
    if any(reader is not total and reader not in own for node in own for reader in view.readers(node)):
        return None
    if not same_shape(view.shape(residual), view.shape(total)) or view.dtype(residual) != view.dtype(total):
        return None
    if view.dtype(linear.node) != view.dtype(total) or _is_adapter(view, residual):
        return None
    interior = tuple(dict.fromkeys((*linear.trail, *own, total)))
    args = (linear.input, linear.weight, linear.bias, residual)
    return Site(KIND, (total,), total, args, interior, "linear, residual add")


def _is_adapter(view: CanonicalGraph, residual: object) -> bool:
    """Whether it is a product scaled by a number, which an adapter adds to a linear."""
    node = view.strip(residual)
    factors = view.operands(node, "mul")
    scaled = factors is not None and any(view.number(factor) is not None for factor in factors)
    inner = factors if scaled and factors is not None else (node,)
    return any(view.call(view.strip(item), "linear") is not None for item in inner)


RULE = Rule(KIND, (), propose)
