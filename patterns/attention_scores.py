"""Attention written out: softmax(scale * q k^T + mask) v around a softmax.

Read outwards from the softmax to the product with v, then inwards through masks, scales and casts to the product of q
and k (`score_steps`), every axis followed by identity. What is met and has no step becomes a refusal that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from infuse.patterns import contractions, other_products, score_masks
from infuse.patterns.attention import Reading, assemble, refuse
from infuse.patterns.attention_operands import Operand, Roles
from infuse.patterns.axes import Axes, Axis, flat, fresh, leaves, resolved
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.contractions import Contraction
from infuse.patterns.probabilities import Output, leads_to_values, outwards, tests_of_rows
from infuse.patterns.score_steps import MAX_STEPS, STEPS, Scores, biased, reaches_product
from infuse.patterns.sites import Finding, Refusal

_MASKED = (
    "the scores are overwritten by something that is no mask",
    "overwrite them by -inf or by finfo.min, by a bool mask, after all scales",
)
_SHAPE_READERS = frozenset({"full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones", "new_tensor"})
_UNHANDLED = {
    "masked_fill": _MASKED,
    "where": _MASKED,
    "tanh": ("tanh lies between the product of q and k and the softmax", "cap the scores once, before the mask"),
    "cat": ("the scores have extra columns", "add one column of a number for each head, after mask and scale"),
}


@dataclass(frozen=True, slots=True)
class _Product:
    """The product of q and k: both operands, the axes of the queries and of the inner dimension."""

    product: Contraction
    q: Operand
    k: Operand
    queries: Axes
    inner: Axes


@dataclass(frozen=True, slots=True)
class _Softmax:
    """A softmax over one dimension: its result, what it is of, and the nodes that compute it."""

    node: Node
    source: Node
    dim: int
    trail: tuple[Node, ...]


def match(view: CanonicalGraph, anchor: Node) -> Finding | None:
    """The attention around a softmax; None for any other use of softmax."""
    softmax = _softmax(view, anchor)
    if softmax is None:
        return None
    if not leads_to_values(view, softmax.node):
        return other_products.match(view, softmax.node)
    axes = tuple(
        (Axis(size),) if dim == softmax.dim else fresh(size) for dim, size in enumerate(view.shape(softmax.node))
    )
    trail = (*softmax.trail, *tests_of_rows(view, softmax.node, softmax.source))
    scores = _inwards(view, Scores(softmax.source, axes, axes[softmax.dim], trail=trail))
    if not isinstance(scores, Scores):
        return scores and replace(scores, node=anchor)
    product = _roles(view, scores)
    if product is None:
        return refuse(anchor, f"the softmax is over dimension {softmax.dim}", "let the keys be the last dimension")
    output = outwards(view, softmax.node, softmax.source, axes, scores)
    if not isinstance(output, Output):
        return output
    if _is_router(view, product, output):
        return None
    return assemble(view, _reading(view, scores, product, output))


def may_be_softmax(view: CanonicalGraph, anchor: Node) -> bool:
    """Whether an exponential is divided by its sum or is a softmax's, by the words alone; True for a softmax."""
    if view.word(anchor) != "exp":
        return True
    readers = {view.word(reader) for reader in view.readers(anchor)}
    return {"sum", "div"} <= readers or "log_softmax" in {view.word(node) for node in anchor.all_input_nodes}


def _softmax(view: CanonicalGraph, anchor: Node) -> _Softmax | None:
    """softmax(x), exp(log_softmax(x)), or exp(x) / exp(x).sum(dim, keepdim=True)."""
    call = view.call(anchor, "softmax", "exp")
    if call is None or not isinstance(call["input"], Node):
        return None
    if call.name == "softmax":
        dims = call["dim"]
        return _Softmax(anchor, call["input"], dims[0], (anchor,)) if dims is not None and len(dims) == 1 else None
    logarithm = view.call(call["input"], "log_softmax")
    if logarithm is not None:
        dims, source = logarithm["dim"], logarithm["input"]
        plain = logarithm["dtype"] is None and isinstance(source, Node) and dims is not None and len(dims) == 1
        return _Softmax(anchor, source, dims[0], (anchor, call["input"])) if plain else None
    readers = view.readers(anchor)
    total = next((reader for reader in readers if view.call(reader, "sum") is not None), None)
    quotient = next((reader for reader in readers if view.operands(reader, "div") == (anchor, total)), None)
    found = view.call(total, "sum")
    if len(readers) != 2 or quotient is None or total is None or found is None or view.readers(total) != [quotient]:
        return None
    dims = found["dim"]
    if dims is None or len(dims) != 1 or not found["keepdim"] or found["dtype"] is not None:
        return None
    return _Softmax(quotient, call["input"], dims[0], (quotient, total, anchor))


def _reading(view: CanonicalGraph, scores: Scores, product: _Product, output: Output) -> Reading:
    trail = (*scores.trail, scores.node, *output.trail)
    return Reading(
        root=output.root,
        root_dims=output.root_dims,
        q=product.q,
        k=product.k,
        v=output.v,
        scores=scores.dims,
        roles=Roles(product.queries, scores.keys, product.inner, output.values),
        product=scores.node,
        values_product=output.product,
        scale=scores.scale,
        softcap=scores.softcap,
        sinks=scores.sinks,
        masks=score_masks.emptied(scores.masks) if output.emptied else scores.masks,
        by=scores.by,
        zero_rows=output.zero_rows or scores.sinks is not None,
        dropout_p=output.dropout_p,
        trail=trail,
        words=("softmax(q k^T) v", *reversed(scores.words), *output.words),
    )


def _inwards(view: CanonicalGraph, scores: Scores) -> Scores | Refusal | None:
    """The scores read back to the product of q and k; None if there is no such product behind them."""
    for _ in range(MAX_STEPS):
        others = [
            reader
            for reader in view.readers(scores.node)
            if reader not in scores.trail and not _reads_shape(view, reader, scores.node)
        ]
        if others and reaches_product(view, scores.node):
            return refuse(scores.node, "the attention scores are read elsewhere", "do not return or reuse the scores")
        if contractions.read(view, scores.node) is not None:
            with_bias = biased(view, scores)
            if with_bias is None:
                return refuse(scores.node, "baddbmm has factors that are no numbers", "pass alpha and beta as numbers")
            return with_bias
        following = next((found for step in STEPS if (found := step(view, scores)) is not None), None)
        if following is None:
            break
        scores = following
    if not reaches_product(view, scores.node):
        return None
    name = view.word(scores.node) or str(getattr(scores.node.target, "__name__", scores.node.target))
    reason, remedy = _UNHANDLED.get(
        name, (f"{name} lies between the product of q and k and the softmax", "write it as a float mask that is added")
    )
    return refuse(scores.node, reason, remedy)


def _reads_shape(view: CanonicalGraph, node: Node, tensor: Node) -> bool:
    """Whether a node reads a tensor's shape, dtype and device only: a constant like it, `x.view_as(tensor)`."""
    if view.word(node) in ("reshape", "expand", "to") and node.args[0] is not tensor:
        return True
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0] in _SHAPE_READERS


def _roles(view: CanonicalGraph, scores: Scores) -> _Product | None:
    """Which operand of the product is q; None where the keys are not exactly what one operand has alone."""
    product = contractions.read(view, scores.node)
    assert product is not None
    labelled = contractions.label_operands(view, product, scores.dims)
    keys = leaves(scores.keys)
    if labelled is None or not keys:
        return None
    having = [index for index, dims in enumerate(labelled) if set(keys) & set(flat(dims))]
    if len(having) != 1 or keys not in resolved(labelled[having[0]]):
        return None
    k, q = having[0], 1 - having[0]
    alone = [letter for letter in product.out if letter in product.letters[q] and letter not in product.letters[k]]
    if not alone:
        return None
    by_letter = dict(zip(product.letters[q], labelled[q]))
    return _Product(
        product,
        Operand(product.operands[q], labelled[q]),
        Operand(product.operands[k], labelled[k]),
        by_letter[alone[-1]],
        by_letter[product.summed or ""],
    )


def _is_router(view: CanonicalGraph, product: _Product, output: Output) -> bool:
    """Whether q is multiplied by a bare matrix [D, T] that all share, a router's weights, and not by a k^T."""
    others = {*leaves(product.inner), *leaves(output.values)}
    k, v = set(flat(product.k.dims)), set(flat(output.v.dims))
    if (k & v) - others != k - others or len((k & v) - others) > 1:
        return False
    letters = product.product.letters[product.product.operands.index(product.k.node)]
    as_matrix = letters[-2:] == ("sum", "columns")
    return as_matrix and view.call(view.strip(product.k.node, widening=True), "permute") is None
