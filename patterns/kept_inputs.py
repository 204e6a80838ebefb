"""Whether a norm's input lies in memory when its backward runs, also if no operator of ours asks for it.

A backward kernel reads the norm's input, so that it has to be saved. Stock Inductor saves it too, unless it can compute
it again from what is saved for other reasons. So a kernel costs no memory only where the input, or what it is the sum
of, comes straight from an operation that is never computed again, and whose result nobody else needs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Make, Site

KINDS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "qk_norm_rope")
# Of these, what is several sites again without a kernel, as its policy has it.
LEFT_TO_PARTS = ("qk_norm_rope",)
# Never computed again; their backward does not read their result (that of sdpa does, so it is saved).
_PRODUCERS = ("linear", "matmul", "bmm")
_VIEWS = ("alias", "reshape", "permute", "expand")
_PARTS = ("chunk", "split", "unbind", "narrow", "select", "getitem")  # views that are in no table


def is_kept(view: CanonicalGraph, site: Site, replaced: Mapping[Node, Node]) -> bool:
    """Whether the input of a norm, or the sum that it is taken of, would be saved without a kernel too.

    replaced: what earlier rewrites put in the place of nodes. A gated MLP ends in a product as the linear did.
    """
    if site.kind.startswith("add_"):
        x, residual = site.args[:2]
        return _is_new(view, x, replaced) or _is_new(view, residual, replaced)
    x = site.args[0]
    x = _behind_views(view, x.args[0] if isinstance(x, Make) else x)
    if not isinstance(x, Node):
        return False
    if x.op in ("placeholder", "get_attr") or view.word(x) in (*_PRODUCERS, "sdpa"):
        return True
    operands = view.operands(x, "add")
    return operands is not None and any(_is_new(view, operand, replaced) for operand in operands)


def _behind_views(view: CanonicalGraph, node: object) -> object:
    while isinstance(node, Node) and node.args and _is_view(view, node):
        node = node.args[0]
    return node


def _is_view(view: CanonicalGraph, node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return view.call(node, *_VIEWS) is not None or name in _PARTS


def _is_new(view: CanonicalGraph, operand: object, replaced: Mapping[Node, Node]) -> bool:
    """Whether a term of a sum would have to be saved in place of the sum: a product that is read by this sum alone.

    On its way it may be scaled by a number or dropped out, for neither of which its value is needed again.
    """
    node = operand
    dtype = view.dtype(node)
    while isinstance(node, Node):
        readers = [reader for reader in view.readers(replaced.get(node, node)) if reader.users]
        if len(readers) != 1 or view.dtype(node) != dtype:
            return False
        if view.word(node) in _PRODUCERS:
            return True
        factors = view.operands(node, "mul")
        scaled = factors is not None and view.number(factors[1]) is not None
        if not (scaled or view.call(node, *_VIEWS, "dropout") is not None):
            return False
        node = node.args[0]
    return False
