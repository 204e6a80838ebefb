"""Softmaxes of attention whose products no operator takes: seen, named and left as they are.

Overlapping chunks (Longformer, https://arxiv.org/abs/2004.05150): the scores are copied band by band out of the
products of chunks, and the probabilities padded and shifted into chunks again, so that a column stands for another key
in each row. And products written as a multiply that broadcasts and a sum, which are none to Inductor either.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from infuse.patterns.attention import refuse
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.contractions import PRODUCTS
from infuse.patterns.sites import Refusal
from infuse.patterns.sizes import same_shape

_CUTS = frozenset({"as_strided", "unfold", "pad", "constant_pad_nd"})
_LAYOUT = ("alias", "cast", "dropout", "permute", "reshape", "slice", "where", "masked_fill", "expand")
# How many nodes are looked at on either side of a softmax.
_MAX_NODES = 64
# Scales and masks between the sum and the softmax; a product of [S, D] and [T, D] has three dimensions.
_MAX_SCALES = 4
_MIN_RANK = 3


def match(view: CanonicalGraph, softmax: Node) -> Refusal | None:
    """A refusal if the softmax's result reaches a product through a cut into chunks, and comes from another product."""
    if _is_between_sums(view, softmax):
        return refuse(
            softmax,
            "its products are written as a multiply that broadcasts and a sum",
            "write them as matmul or einsum",
        )
    if not _is_cut_for_a_product(view, softmax) or not _comes_from_a_product(view, softmax):
        return None
    return refuse(
        softmax,
        "its probabilities are cut into overlapping chunks",
        "take the products of whole q, k and v, with a sliding window as the mask",
    )


def _is_cut_for_a_product(view: CanonicalGraph, softmax: Node) -> bool:
    pending = [(softmax, False)]
    for _ in range(_MAX_NODES):
        if not pending:
            return False
        node, cut = pending.pop()
        for reader in view.readers(node):
            if cut and view.call(reader, *PRODUCTS) is not None:
                return True
            name = _name(reader)
            if name in _CUTS or view.call(reader, *_LAYOUT) is not None:
                pending.append((reader, cut or name in _CUTS))
    return False


def _comes_from_a_product(view: CanonicalGraph, softmax: Node) -> bool:
    pending, seen = [softmax], {softmax}
    while pending and len(seen) < _MAX_NODES:
        for source in _sources(pending.pop()):
            if view.call(source, *PRODUCTS) is not None:
                return True
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return False


def _is_between_sums(view: CanonicalGraph, softmax: Node) -> bool:
    """Whether both what the softmax is of and what it is for are sums of products of two larger tensors."""
    node = next(iter(softmax.all_input_nodes), softmax)
    for _ in range(_MAX_SCALES):
        if view.call(node, "sum") is not None:
            break
        operands = view.operands(node, "mul") or view.operands(node, "div") or view.operands(node, "add")
        if operands is None or not isinstance(operands[0], Node):
            return False
        node = operands[0]
    readers = _readers_past_views(view, softmax)
    summed = [reader for product in readers for reader in view.readers(product) if view.call(reader, "sum") is not None]
    return _is_sum_of_products(view, node) and any(_is_sum_of_products(view, reader) for reader in summed)


def _readers_past_views(view: CanonicalGraph, node: Node) -> list[Node]:
    views = [node, *(reader for reader in view.readers(node) if view.call(reader, *_LAYOUT) is not None)]
    return [reader for item in views for reader in view.readers(item)]


def _is_sum_of_products(view: CanonicalGraph, node: Node) -> bool:
    """sum(a * b) over one dimension, a and b each broadcast along one that the other has."""
    call = view.call(node, "sum")
    factors = view.operands(call["input"], "mul") if call is not None else None
    if call is None or factors is None or not all(isinstance(factor, Node) for factor in factors):
        return False
    shapes = [tuple(view.shape(factor)) for factor in factors]
    return len(shapes[0]) == len(shapes[1]) >= _MIN_RANK and not same_shape(*shapes)


def _sources(node: Node) -> Iterator[Node]:
    """What a node is made from: its inputs, and what was written into it."""
    yield from node.all_input_nodes
    for user in node.users:
        if _name(user) in ("setitem", "copy_") and user.args[0] is node:
            yield from user.all_input_nodes[1:]


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
