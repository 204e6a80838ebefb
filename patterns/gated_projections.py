"""The gate and up projections in front of a gated activation: two products of one input, or one packed product.

Which part of a packed product is the gate is read from the example values: both are views of the product, whose offsets
and strides say which columns they hold, however the author took them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.linears import SUBCLASS, Linear, read_linear, stands_for_others, why_no_linear
from infuse.patterns.safety import storages
from infuse.patterns.sites import Site
from infuse.patterns.sizes import same_shape, same_size

_VIEWS = ("alias", "reshape", "permute", "getitem", "slice", "split", "select", "index")
_MAX_VIEWS = 6
# (offset of the gate's first column, of up's, distance of columns) -> order of the packed weight's rows, for halves of
# F columns; offsets in units of F where the columns are adjacent.
_ORDERS = {
    (0, 1, 1): "gate_up",
    (1, 0, 1): "up_gate",
    (0, 1, 2): "interleaved",
    (1, 0, 2): "interleaved_up_first",
}
READ_ELSEWHERE = "gate or up is read elsewhere too: let nothing but act(gate) * up read them"
OTHER_INPUT = "gate and up project different inputs"


@dataclass(frozen=True, slots=True)
class Projections:
    """products: gate's and up's, or the packed one. between: the nodes from there to the activation."""

    products: tuple[Node, ...]
    between: tuple[Node, ...]
    order: str


@dataclass(frozen=True, slots=True)
class GateAndUp:
    """Gate and up as linears. interior: their nodes, and those between them and the activation."""

    linears: tuple[Linear, ...]
    order: str
    interior: tuple[Node, ...]

    @property
    def arguments(self) -> tuple[tuple[Node, ...], tuple[Node | None, ...], str]:
        """weights, biases, order"""
        weights = tuple(linear.weight for linear in self.linears)
        return weights, tuple(linear.bias for linear in self.linears), self.order


def read_linears(view: CanonicalGraph, site: Site) -> GateAndUp | str | None:
    """The linears in front of a swiglu site; why they cannot be taken in, or None for something else than linears."""
    found = read_projections(view, site, "linear")
    if not isinstance(found, Projections):
        return found if found is not None else _obstacle(view, site)
    linears: list[Linear] = []
    for node in found.products:
        linear = read_linear(view, node)
        if linear is None:
            return why_no_linear(view, node)
        linears.append(linear)
    if any(linear.input is not linears[0].input for linear in linears):
        return OTHER_INPUT
    if not all(same_shape(view.shape(linear.weight), view.shape(linears[0].weight)) for linear in linears):
        return None
    trail = [node for linear in linears for node in linear.trail]
    return GateAndUp(tuple(linears), found.order, tuple(dict.fromkeys((*trail, *found.products, *found.between))))


def read_projections(view: CanonicalGraph, site: Site, *words: str) -> Projections | str | None:
    """The products (by their words) that a swiglu site reads as gate and up; a reason where others read them too."""
    gate, up = site.args[:2]
    if not isinstance(gate, Node) or not isinstance(up, Node):
        return None
    sides = [_behind_views(view, node, words) for node in (gate, up)]
    (gate_product, gate_trail), (up_product, up_trail) = sides
    if gate_product is None or up_product is None:
        return None
    between = tuple(dict.fromkeys((*gate_trail, *up_trail)))
    if gate_product is not up_product:
        if not all(_is_whole(view, *pair) for pair in ((gate, gate_product), (up, up_product))):
            return None
        found = Projections((gate_product, up_product), between, "gate_up")
    else:
        order = _order(view, gate, up, gate_product)
        if order is None:
            return None
        found = Projections((gate_product,), between, order)
    own = {*found.products, *between, *site.interior}
    if any(reader not in own for node in (*found.products, *between) for reader in view.readers(node)):
        return READ_ELSEWHERE
    return found


def _behind_views(view: CanonicalGraph, node: Node, words: tuple[str, ...]) -> tuple[Node | None, tuple[Node, ...]]:
    """(the product that a node is, or is a view of; the views)"""
    trail: list[Node] = []
    for _ in range(_MAX_VIEWS):
        if view.word(node) in words:
            return node, tuple(trail)
        inner = view.argument(node, "input")
        if view.call(node, *_VIEWS) is None or not isinstance(inner, Node):
            break
        trail.append(node)
        node = inner
    return None, ()


def _is_whole(view: CanonicalGraph, part: Node, product: Node) -> bool:
    """Whether a node holds a product's result as it is."""
    return view.strip(part) is product


def _order(view: CanonicalGraph, gate: Node, up: Node, product: Node) -> str | None:
    """Which columns of a packed product are the gate's; None if gate and up are not its two halves."""
    places = [_columns(view, node, product) for node in (gate, up)]
    if places[0] is None or places[1] is None or places[0][1] != places[1][1]:
        return None
    return _ORDERS.get((places[0][0], places[1][0], places[0][1]))


def _columns(view: CanonicalGraph, part: Node, product: Node) -> tuple[int, int] | None:
    """(number of the half, distance of columns) of a view of half of a product's columns."""
    mine, whole = view.tensor(view.strip(part)), view.tensor(product)
    if mine is None or whole is None or mine.dim() != whole.dim() or not storages(mine) & storages(whole) - {-1}:
        return None
    size, offset = mine.shape[-1], mine.storage_offset() - whole.storage_offset()
    if type(size) is not int or type(offset) is not int or not same_size(whole.shape[-1], 2 * size):
        return None
    if mine.dtype != whole.dtype or not same_shape(mine.shape[:-1], whole.shape[:-1]):
        return None
    leading = [(a, b) for a, b, n in zip(mine.stride()[:-1], whole.stride()[:-1], mine.shape) if not same_size(n, 1)]
    distance = mine.stride(-1)
    if whole.stride(-1) != 1 or not same_shape(*([pair[i] for pair in leading] for i in (0, 1))):
        return None
    if distance == 1 and size > 1 and offset % size == 0:
        return offset // size, 1
    return (offset, 2) if distance == 2 else None


def _obstacle(view: CanonicalGraph, site: Site) -> str | None:
    """Why gate or up is no linear although it nearly is one: sharded, or something is added to it, as LoRA does."""
    for side in site.args[:2]:
        node = view.strip(side)
        if isinstance(node, Node) and any(stands_for_others(view, item) for item in (node, *node.all_input_nodes)):
            return SUBCLASS
        operands = view.operands(node, "add")
        if operands is not None and any(view.call(view.strip(item), "linear") is not None for item in operands):
            return "something is added to the gate or up projection (LoRA?): merge it into the weight"
    return None
