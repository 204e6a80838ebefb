"""Dimensions followed by identity: which axis of one tensor is which axis of another, whatever views lie in between.

A tensor's dimensions are described as `Dims`: for each dimension the axes that it is made of, outermost first; a
dimension of size 1 is made of none, unless it is to be followed all the same. Reshapes split and join dimensions:
splitting an axis refines it everywhere it occurs, so that a [B * H, S, D] product and the [B, H, S, T] view of its
scores are seen to share B and H.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from infuse.patterns.sizes import Size, plain, same_size


class Axis:
    """An axis of a tensor, compared by identity. parts: what it was split into, outermost first."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = plain(size)
        self.parts: tuple[Axis, ...] = ()


Axes = tuple[Axis, ...]
Dims = tuple[Axes, ...]


def fresh(size: Size) -> Axes:
    """A new dimension."""
    return () if same_size(size, 1) else (Axis(size),)


def learn(axes: Axes, size: Size) -> None:
    """Takes over another expression of an axis' size if it is simpler; torch divides sizes of products needlessly."""
    if len(axes) == 1 and not axes[0].parts and len(str(size)) < len(str(axes[0].size)):
        axes[0].size = size


def leaves(axes: Iterable[Axis]) -> Axes:
    """The axes as they are split by now."""
    found: list[Axis] = []
    for axis in axes:
        found += leaves(axis.parts) if axis.parts else [axis]
    return tuple(found)


def resolved(dims: Dims) -> Dims:
    """The dimensions as they are split by now."""
    return tuple(leaves(axes) for axes in dims)


def flat(dims: Dims) -> Axes:
    """All axes of a tensor, in the order of its elements."""
    return leaves(axis for axes in dims for axis in axes)


def numel(axes: Iterable[Axis]) -> Size:
    """How many elements lie along the axes."""
    return math.prod((axis.size for axis in axes), start=1)


def divides(divisor: Size, size: Size) -> bool:
    """Whether `divisor` provably divides `size`."""
    if type(divisor) is int and divisor <= 0:
        return False
    return same_size(size % divisor, 0)  # type: ignore[operator]


def regroup(dims: Dims, shape: Sequence[Size], whole: Collection[Axis] = ()) -> Dims | None:
    """The same elements in a tensor of another shape, as a reshape gives them, in either direction.

    None where the shapes cannot be matched, or only by splitting an axis in `whole`.
    """
    if any(same_size(size, 0) for size in shape):
        return None
    remaining = list(flat(dims))
    result: list[Axes] = []
    for size in shape:
        taken = _take(remaining, size, whole)
        if taken is None:
            return None
        result.append(taken)
    if remaining and result and not result[-1] and same_size(numel(remaining), 1):
        return (*result[:-1], tuple(remaining))
    return None if remaining else tuple(result)


def _take(remaining: list[Axis], size: Size, whole: Collection[Axis]) -> Axes | None:
    """Takes the axes of a dimension of `size` off the front, splitting the last one if need be."""
    taken: list[Axis] = []
    product: Size = 1
    while not same_size(product, size):
        if not remaining:
            return None
        axis = remaining.pop(0)
        if not divides(product * axis.size, size):
            if not divides(product, size):
                return None
            outer = size // product
            if same_size(outer, axis.size):
                return (*taken, axis)
            if axis in whole or same_size(outer, 1) or not divides(outer, axis.size):
                return None
            axis.parts = (Axis(outer), Axis(axis.size // outer))
            remaining.insert(0, axis.parts[1])
            axis = axis.parts[0]
        taken.append(axis)
        product = product * axis.size
    learn(tuple(taken), size)
    return tuple(taken)


def permuted(dims: Dims, order: Sequence[int]) -> Dims:
    """Dimension i of the result is dimension order[i]."""
    return tuple(dims[dim] for dim in order)


def unpermuted(dims: Dims, order: Sequence[int]) -> Dims:
    """What `permuted` makes `dims` of."""
    return tuple(dims[order.index(dim)] for dim in range(len(dims)))


def aligned(shape: Sequence[Size], dims: Dims) -> Dims | None:
    """The dimensions of a tensor that broadcasts to one with `dims` and enlarges nothing in it."""
    if len(shape) > len(dims):
        return None
    result: list[Axes] = []
    for size, axes in zip(shape, dims[len(dims) - len(shape) :]):
        if same_size(size, 1):
            result.append(())
        elif same_size(size, numel(axes)):
            result.append(axes)
        else:
            return None
    return tuple(result)
