"""Products that are widened to float32 at once and returned so, as decoders return their logits: made in float32.

    prims.convert_element_type(view(mm(a, b)), float32)  ->  view(mm(a, b, out_dtype=float32))

The product is accumulated in float32 anyway. Written as that it is not rounded in between, and the pass that reads the
narrow result and writes the wide one is saved: on an H200 0.5 ms of 30 for the logits of 4,096 tokens of Llama 3.

    prims.convert_element_type(norm_linear(...)[0], float32)  ->  norm_linear(..., in_float32=True)[0]

Behind a norm the linear may be a kernel, which a pass that widens could not be fused with. It rounds as before: the
operator's formula contains the conversion, so that nothing changes where the products are torch's after all. On an H200
that pass took 7 us of the 968 of a step, over the logits of 16 rows of Qwen2.5 0.5B.

Only where the wide tensor is a result of the graph. What else reads a widened product is fused with the widening, and
reads half as much where the product stays narrow.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from infuse.lowering import graph_neighbours, inductor
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import linears as heuristics
from infuse.ops import library, linear_kernels

KIND = "wide_product"
_CONVERT = torch.ops.prims.convert_element_type.default
_PRODUCT = torch.ops.aten.mm.default
_NORM_LINEAR = torch.ops.infuse.norm_linear.default
_WIDE_PRODUCT = torch.ops.aten.mm.dtype
_NARROW = (torch.bfloat16, torch.float16)
# Views of all of a tensor's elements, in their order.
_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsqueeze.default,
)


def widen_products(graph: Graph) -> None:
    """Rewrites the graph, which Inductor is about to lower, where numerics and stored measurements allow it."""
    settings = inductor.settings_in_effect()
    may_round_less = settings.kernels != "never" and settings.numerics != "exact" and not inductor.writes_cpp()
    for node in graph.find_nodes(op="call_function", target=_CONVERT):
        chain = _from_product(node) if node.args[1] == torch.float32 and _is_returned(node) else []
        if not chain:
            continue
        if chain[0].target is operator.getitem:
            _widen_linear(node, chain)
        elif may_round_less and _runs_well(chain[0]):
            _widen(node, chain)


def _from_product(node: Node) -> list[Node]:
    """A product and the views of it, in order, that nothing but this conversion reads; [] for any other value."""
    chain: list[Node] = []
    value = node.args[0]
    while isinstance(value, Node) and len(value.users) == 1:
        chain.insert(0, value)
        if value.target is _PRODUCT or _is_linear(value):
            return chain if value.meta["val"].dtype in _NARROW else []
        if value.target not in _VIEWS:
            return []
        value = value.args[0]
    return []


def _is_linear(value: Node) -> bool:
    """Whether a value is all that is read of the only linear behind a norm."""
    if value.target is not operator.getitem:
        return False
    source = value.args[0]
    if not isinstance(source, Node) or source.target is not _NORM_LINEAR:
        return False
    _, _, weights, *_ = source.args
    assert isinstance(weights, Sequence)
    return value.args[1:] == (0,) and len(weights) == 1 and [user.args[1] for user in source.users].count(0) == 1


def _is_returned(node: Node) -> bool:
    return any(reader.op == "output" for reader in graph_neighbours.readers(node))


def _runs_well(product: Node) -> bool:
    value = product.meta["val"]
    if not all(isinstance(size, int) for size in value.shape) or library.missing(value.device):
        return False
    return heuristics.widens_well(value.numel(), library.capability(value.device))


def _widen_linear(node: Node, chain: list[Node]) -> None:
    """Puts the views of a linear in the place of the conversion `node`, and makes them float32."""
    linear = chain[0].args[0]
    assert isinstance(linear, Node)
    linear.args = (*linear_kernels.with_defaults("norm_linear", linear.args)[:-1], True)
    product, *sums = linear.meta["val"]
    linear.meta["val"] = [product.to(torch.float32), *sums]
    for value in chain:
        value.meta["val"] = value.meta["val"].to(torch.float32)
    node.replace_all_uses_with(chain[-1])
    node.graph.erase_node(node)


def _widen(node: Node, chain: list[Node]) -> None:
    """Puts the wide product and its views in the place of the conversion `node`."""
    product, *views = chain
    graph = node.graph
    with graph.inserting_before(node):
        wide = graph.call_function(_WIDE_PRODUCT, (*product.args, torch.float32))
        wide.meta = {**product.meta, "val": product.meta["val"].to(torch.float32)}
        for view in views:
            assert callable(view.target)
            wide = graph.call_function(view.target, (wide, *view.args[1:]))
            wide.meta = {**view.meta, "val": view.meta["val"].to(torch.float32)}
    node.replace_all_uses_with(wide)
    for old in (node, *reversed(chain)):
        graph.erase_node(old)
    rows, outputs = product.meta["val"].shape
    described = f"{rows}x{outputs} {product.meta['val'].dtype}"
    record(Decision(KIND, described, "float32", "by stored measurements; it is returned in float32"))
