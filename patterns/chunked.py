"""Attention over overlapping chunks (Longformer, https://arxiv.org/abs/2004.05150): seen, named and left as it is.

The scores are copied band by band out of the products of chunks, and the probabilities padded and shifted into chunks
again: a column stands for another key in each row, which no operator here computes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from infuse.patterns.attention import refuse
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.contractions import PRODUCTS
from infuse.patterns.sites import Refusal

_CUTS = frozenset({"as_strided", "unfold", "pad", "constant_pad_nd"})
_LAYOUT = ("alias", "cast", "dropout", "permute", "reshape", "slice", "where", "masked_fill", "expand")
# How many nodes are looked at on either side of a softmax.
_MAX_NODES = 64


def match(view: CanonicalGraph, softmax: Node) -> Refusal | None:
    """A refusal if the softmax's result reaches a product through a cut into chunks, and comes from another product."""
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


def _sources(node: Node) -> Iterator[Node]:
    """What a node is made from: its inputs, and what was written into it."""
    yield from node.all_input_nodes
    for user in node.users:
        if _name(user) in ("setitem", "copy_") and user.args[0] is node:
            yield from user.all_input_nodes[1:]


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
