"""Products of two tensors, read alike whether written as matmul, bmm, baddbmm or einsum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from infuse.patterns.axes import Axes, Dims, fresh, learn, numel
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sizes import Size, same_size

PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")
Letters = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contraction:
    """out[letters of out] = sum over the letters that are missing there of operands[0] * operands[1]."""

    node: Node
    operands: tuple[Node, Node]
    letters: tuple[Letters, Letters]
    out: Letters

    @property
    def summed(self) -> str | None:
        """The letter that is summed over; None unless it is exactly one, which both operands have."""
        first, second = (set(letters) for letters in self.letters)
        missing = (first | second) - set(self.out)
        return missing.pop() if len(missing) == 1 and missing <= first & second else None


def read(view: CanonicalGraph, node: object) -> Contraction | None:
    """The product of two tensors that a node is; of baddbmm the product alone."""
    call = view.call(node, *PRODUCTS)
    if call is None or not isinstance(node, Node):
        return None
    if call.name == "einsum":
        return _read_einsum(view, node, call["equation"], call["operands"])
    left, right = (call["batch1"], call["batch2"]) if call.name == "baddbmm" else (call["input"], call["other"])
    ranks = len(view.shape(left)), len(view.shape(right))
    if min(ranks) < 2:
        return None
    batch = [f"batch {i}" for i in range(max(ranks) - 2)]
    letters = [tuple(batch[max(ranks) - rank :]) for rank in ranks]
    return Contraction(
        node,
        (left, right),
        ((*letters[0], "rows", "sum"), (*letters[1], "sum", "columns")),
        (*batch, "rows", "columns"),
    )


def _read_einsum(view: CanonicalGraph, node: Node, equation: object, operands: Any) -> Contraction | None:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = operands[0]
    if not isinstance(equation, str) or len(operands) != 2 or not all(view.shape(item) for item in operands):
        return None
    found = re.fullmatch(r"([a-zA-Z.]*),([a-zA-Z.]*)->([a-zA-Z.]*)", equation.replace(" ", ""))
    if found is None:
        return None
    spare = [len(view.shape(item)) - len(term.replace("...", "")) for item, term in zip(operands, found.groups())]
    ellipsis = max(spare)
    terms = [_letters(term, count) for term, count in zip(found.groups(), (*spare, ellipsis))]
    if any(len(set(term)) != len(term) for term in terms) or not set(terms[2]) <= {*terms[0], *terms[1]}:
        return None
    if any(len(term) != len(view.shape(item)) for term, item in zip(terms, (*operands, node))):
        return None
    return Contraction(node, (operands[0], operands[1]), (terms[0], terms[1]), terms[2])


def _letters(term: str, count: int) -> Letters:
    """The letters of an einsum term; an ellipsis stands for `count` dimensions, numbered from the right."""
    before, dots, after = term.partition("...")
    return (*before, *(f"...{i}" for i in reversed(range(count)) if dots), *after)


def label_operands(view: CanonicalGraph, product: Contraction, out: Dims) -> tuple[Dims, Dims] | None:
    """The dimensions of both operands, given those of the product."""
    known = dict(zip(product.out, out))
    summed = product.summed
    if summed is None:
        return None
    left, right = (view.shape(operand) for operand in product.operands)
    known[summed] = fresh(left[product.letters[0].index(summed)])
    first, second = _label(left, product.letters[0], known), _label(right, product.letters[1], known)
    return None if first is None or second is None else (first, second)


def label_product(view: CanonicalGraph, product: Contraction, index: int, dims: Dims) -> tuple[Dims, Dims] | None:
    """(dimensions of the other operand, of the product), given those of operand `index`."""
    known = dict(zip(product.letters[index], dims))
    other = 1 - index
    shape = view.shape(product.operands[other])
    for letter, size in zip(product.letters[other], shape):
        known.setdefault(letter, fresh(size))
    labelled, out = _label(shape, product.letters[other], known), _label(view.shape(product.node), product.out, known)
    return None if labelled is None or out is None else (labelled, out)


def _label(shape: Sequence[Size], letters: Letters, known: dict[str, Axes]) -> Dims | None:
    dims: list[Axes] = []
    for size, letter in zip(shape, letters):
        axes = known[letter]
        if not same_size(size, numel(axes)):
            if not same_size(size, 1):
                return None
            axes = ()
        learn(axes, size)
        dims.append(axes)
    return tuple(dims)
