"""What becomes of attention probabilities: from the softmax outwards to the product with v."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.fx import Node

from infuse.patterns import contractions, masked_rows
from infuse.patterns.attention import refuse
from infuse.patterns.attention_operands import Operand
from infuse.patterns.axes import Axes, Dims, flat, leaves, permuted, regroup, resolved
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.contractions import PRODUCTS
from infuse.patterns.scales import constant
from infuse.patterns.score_masks import Added, Filled, emptying, never_below
from infuse.patterns.score_steps import Scores
from infuse.patterns.sites import Refusal
from infuse.patterns.sizes import same_size

_THROUGH = ("alias", "cast", "dropout", "permute", "reshape", "slice", "where", "masked_fill", "nan_to_num")


@dataclass(frozen=True, slots=True)
class Output:
    """The product with v, and what happened to the probabilities before.

    root: the node that the operator replaces, a view of the product. values: the axes of v's last dimension. zero_rows:
    whether a row that is masked whole gives zeros; emptied: because that is where the last mask overwrote the scores.
    """

    product: Node
    root: Node
    root_dims: Dims
    v: Operand
    values: Axes
    trail: tuple[Node, ...]
    dropout_p: object = 0.0
    zero_rows: bool = False
    emptied: bool = False
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Weights:
    """The probabilities under the name `node`, made from `scores`; sliced: whether a sink's column is cut off."""

    scores: Node
    node: Node
    dims: Dims
    trail: tuple[Node, ...] = ()
    dropout_p: object = 0.0
    zero_rows: bool = False
    emptied: bool = False
    sliced: bool = False
    words: tuple[str, ...] = ()

    def past(self, node: Node) -> _Weights:
        return replace(self, node=node, trail=(*self.trail, node))


def leads_to_values(view: CanonicalGraph, probabilities: Node) -> bool:
    """Whether a reader of the probabilities, past what is read here, is a product."""
    pending = [probabilities]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        for reader in view.readers(node):
            if reader in seen:
                continue
            seen.add(reader)
            if view.call(reader, *PRODUCTS) is not None:
                return True
            if view.call(reader, *_THROUGH, "mul", "div") is not None:
                pending.append(reader)
    return False


def outwards(view: CanonicalGraph, softmax: Node, source: Node, dims: Dims, scores: Scores) -> Output | Refusal:
    """The product with v; source: what the softmax is of."""
    weights = _Weights(source, softmax, dims)
    while True:
        trail: list[Node] = []
        found = view.only_reader(weights.node, trail)
        if found is None:
            return _read_elsewhere(softmax)
        node, reader = found
        weights = replace(weights, node=node, trail=(*weights.trail, *trail))
        if contractions.read(view, reader) is not None:
            return _values(view, softmax, weights, reader, scores)
        following = _step(view, weights, reader, scores)
        if following is None:
            return _read_elsewhere(softmax)
        weights = following


def _read_elsewhere(softmax: Node) -> Refusal:
    return refuse(
        softmax,
        "the attention probabilities are read elsewhere",
        "do not return or reuse the probabilities (output_attentions=False, need_weights=False)",
    )


def _step(view: CanonicalGraph, weights: _Weights, reader: Node, scores: Scores) -> _Weights | None:
    call = view.call(reader, *_THROUGH)
    if call is None:
        return None
    if call.name == "cast":
        return weights.past(reader)
    if call.name == "dropout" and weights.dropout_p == 0.0 and (scores.sinks is None or weights.sliced):
        p = 0.5 if call["p"] is None else call["p"]
        return replace(weights.past(reader), dropout_p=p, words=(*weights.words, "dropout"))
    if call.name == "permute":
        return replace(weights.past(reader), dims=permuted(weights.dims, call["dims"]))
    if call.name == "reshape":
        dims = regroup(weights.dims, view.shape(reader))
        return None if dims is None else replace(weights.past(reader), dims=dims)
    if call.name == "slice":
        return _slice(view, weights, reader, scores)
    return _safe(view, weights, reader, scores)


def _slice(view: CanonicalGraph, weights: _Weights, reader: Node, scores: Scores) -> _Weights | None:
    """The sink's column cut off."""
    if scores.sinks is None or weights.sliced or not weights.dims:
        return None
    items = reader.args[1] if len(reader.args) > 1 else None
    items = items if isinstance(items, tuple) else (items,)
    wanted = slice(1, None, None) if scores.sink_first else slice(None, -1, None)
    rest = (slice(None), Ellipsis)
    keys = view.shape(reader)[-1]
    length = view.shape(weights.node)[-1]
    last = items[-1]
    is_all_but_one = isinstance(last, slice) and last == wanted and last.step in (None, 1)
    covers = Ellipsis in items or len(items) == len(weights.dims)
    if not is_all_but_one or not covers or any(item not in rest for item in items[:-1]):
        return None
    if not same_size(keys + 1, length):
        return None
    return replace(weights.past(reader), dims=(*weights.dims[:-1], scores.keys), sliced=True)


def _safe(view: CanonicalGraph, weights: _Weights, reader: Node, scores: Scores) -> _Weights | None:
    """Zeros for a row that is masked whole: nan_to_num, or zeros where the mask that overwrote the scores is."""
    call = view.call(reader, "where", "masked_fill", "nan_to_num")
    assert call is not None
    zeroed = replace(weights.past(reader), zero_rows=True, words=(*weights.words, "zeros where all is masked"))
    if call.name == "nan_to_num":
        zeroes = call["nan"] in (None, 0, 0.0) and call["input"] is weights.node
        return _without_infinities(view, weights, reader, scores, zeroed) if zeroes else None
    condition, where = _zeroing(view, reader, weights.node)
    if condition is None:
        return None
    if masked_rows.test_of_scores(view, condition, where, weights.scores) is not None:
        return _without_infinities(view, weights, reader, scores, zeroed)
    last = emptying(view, scores.masks)
    if last is None or not masked_rows.is_test_of_mask(view, condition, where, last):
        return None
    return replace(zeroed, emptied=True)


def _without_infinities(
    view: CanonicalGraph, weights: _Weights, reader: Node, scores: Scores, zeroed: _Weights
) -> _Weights | None:
    """Zeros for a row of -inf: those of a row that is masked whole, or none at all where finite numbers mask it."""
    numbers = {term.value for term in scores.masks if isinstance(term, Filled)}
    if scores.floor is None and numbers <= {-math.inf}:
        return zeroed
    added = [term for term in scores.masks if isinstance(term, Added)]
    finite = -math.inf not in numbers and all(never_below(view, term.value, -math.inf) for term in added)
    return weights.past(reader) if scores.floor is not None or finite else None


def _zeroing(view: CanonicalGraph, reader: Node, weights: Node) -> tuple[object, bool]:
    """The condition that overwrites the probabilities by zero, and whether it does where it is set."""
    call = view.call(reader, "where", "masked_fill")
    if call is None:
        return None, False
    if call.name == "masked_fill":
        zero, where, condition = call["value"], True, call["mask"]
    else:
        where, condition = call["other"] is weights, call["condition"]
        zero = call["input"] if where else call["other"]
    return (condition, where) if constant(view, zero) == 0.0 else (None, False)


def tests_of_rows(view: CanonicalGraph, softmax: Node, scores: Node) -> list[Node]:
    """The nodes that test the softmax's input for rows that are masked whole, to zero its result there."""
    for reader in view.readers(softmax):
        condition, where = _zeroing(view, reader, softmax)
        tests = masked_rows.test_of_scores(view, condition, where, scores)
        if tests is not None:
            return tests
    return []


def _values(view: CanonicalGraph, softmax: Node, weights: _Weights, reader: Node, scores: Scores) -> Output | Refusal:
    product = contractions.read(view, reader)
    assert product is not None
    index = 0 if product.operands[0] is weights.node else 1
    keys = leaves(scores.keys)
    wrong = refuse(softmax, "the product with v is not over the dimension of the softmax", "sum over the keys")
    if view.call(reader, "baddbmm") is not None or product.operands[1 - index] is weights.node:
        return wrong
    if (scores.sinks is not None) != weights.sliced or product.summed is None:
        return wrong
    summed = resolved(weights.dims)[product.letters[index].index(product.summed)]
    own = [letter for letter in product.letters[1 - index] if letter not in product.letters[index]]
    labelled = contractions.label_product(view, product, index, weights.dims)
    if summed != keys or len(own) != 1 or labelled is None:
        return wrong
    v_dims, root_dims = labelled
    values = v_dims[product.letters[1 - index].index(own[0])]
    root, root_dims, trail = _unfold(view, reader, root_dims)
    return Output(
        reader,
        root,
        root_dims,
        Operand(product.operands[1 - index], v_dims),
        values,
        (*weights.trail, reader, *trail),
        weights.dropout_p,
        weights.zero_rows,
        weights.emptied,
        weights.words,
    )


def _unfold(view: CanonicalGraph, product: Node, dims: Dims) -> tuple[Node, Dims, tuple[Node, ...]]:
    """The view of [B * H, S, D] as [B, H, S, D], if that is all that reads the product."""
    readers = view.readers(product)
    call = view.call(readers[0], "reshape") if len(readers) == 1 else None
    if call is None or len(view.shape(readers[0])) <= len(dims):
        return product, dims, ()
    unfolded = regroup(dims, view.shape(readers[0]), flat(dims[-2:]))
    if unfolded is None:
        return product, dims, ()
    return readers[0], unfolded, (readers[0],)
