"""Bringing a tensor into another arrangement of its axes: the views that an operator's arguments and result need."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.axes import Axes, Axis, Dims, flat, numel, resolved
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Make
from infuse.patterns.sizes import Size, same_size

Step = tuple[Callable[..., Any], tuple[object, ...]]
"""(target, arguments behind the tensor)"""


def apply(value: object, steps: Sequence[Step]) -> object:
    """The value after the steps, as an operator's argument."""
    for target, rest in steps:
        value = Make(target, (value, *rest))
    return value


class Relayout:
    """Plans views. sources: tensors whose sizes may be read where a symbolic size is needed."""

    def __init__(self, view: CanonicalGraph, sources: Sequence[Node]) -> None:
        self.view = view
        self.sources = sources

    def plan(self, dims: Dims, targets: Dims, full: Sequence[bool] | None = None) -> list[Step] | None:
        """The steps that make a tensor with `dims` one whose dimension i consists of targets[i].

        A target that the tensor has nothing of becomes a dimension of size 1, or is expanded where full[i]; one that it
        has a part of is expanded. None if the tensor has other axes than the targets, or a size cannot be named.
        """
        dims, targets = resolved(dims), resolved(targets)
        if not set(flat(dims)) <= set(flat(targets)):
            return None
        steps: list[Step] = []
        units = self._unflatten(dims, targets, steps)
        if units is None:
            return None
        positions = {axis: (i, j) for i, axes in enumerate(targets) for j, axis in enumerate(axes)}
        if len(units) == len(targets) and all(not unit or positions[unit[0]][0] == i for i, unit in enumerate(units)):
            placed = [[unit] if unit else [] for unit in units]
        else:
            placed = self._rearrange(units, targets, positions, steps)
        flattened = self._complete(placed, targets, steps)
        return steps if flattened and self._expand(placed, targets, full, steps) else None

    def _unflatten(self, dims: Dims, targets: Dims, steps: list[Step]) -> list[Axes] | None:
        """The units to be moved: a dimension whose axes follow each other in one target stays whole."""
        units: list[Axes] = []
        for axes in dims:
            if not axes or any(_contains(target, axes) for target in targets):
                units.append(axes)
                continue
            sizes = self.sizes(axes)
            if sizes is None:
                return None
            steps.append((torch.unflatten, (len(units), sizes)))
            units += [(axis,) for axis in axes]
        return units

    def sizes(self, axes: Sequence[Axis]) -> tuple[object, ...] | None:
        """The axes' sizes as arguments of unflatten; one that is symbolic is left to torch."""
        known = [axis.size for axis in axes]
        symbolic = [size for size in known if type(size) is not int]
        if len(symbolic) == 1:
            return tuple(size if type(size) is int else -1 for size in known)
        named = [self.size(size) for size in known]
        return None if None in named else tuple(named)

    def size(self, size: Size) -> object | None:
        """A size as an argument: a number, or the node that reads it off a tensor."""
        if type(size) is int:
            return size
        for node in self.sources:
            for dim, own in enumerate(self.view.shape(node)):
                ratio = _ratio(own, size)
                if ratio is not None:
                    read = Make(torch.ops.aten.sym_size.int, (node, dim))
                    return read if ratio == 1 else Make(operator.floordiv, (read, ratio))
        return None

    def _rearrange(
        self, units: list[Axes], targets: Dims, positions: dict[Axis, tuple[int, int]], steps: list[Step]
    ) -> list[list[Axes]]:
        single = tuple(dim for dim, unit in enumerate(units) if not unit)
        if single:
            steps.append((torch.squeeze, (single,)))
        kept = [unit for unit in units if unit]
        order = sorted(range(len(kept)), key=lambda dim: positions[kept[dim][0]])
        if order != list(range(len(kept))):
            steps.append((torch.permute, (tuple(order),)))
        placed: list[list[Axes]] = [[] for _ in targets]
        for dim in order:
            placed[positions[kept[dim][0]][0]].append(kept[dim])
        at = 0
        for units_here in placed:
            if not units_here:
                steps.append((torch.unsqueeze, (at,)))
            at += max(1, len(units_here))
        return placed

    def _complete(self, placed: list[list[Axes]], targets: Dims, steps: list[Step]) -> bool:
        """Joins the units of a target, after expanding what is missing between them."""
        for dim, (units, target) in enumerate(zip(placed, targets)):
            present = {axis for unit in units for axis in unit}
            if not units or (len(units) == 1 and len(present) == len(target)):
                continue
            pieces = _pieces(units, target)
            rank = dim + len(units) + sum(max(1, len(later)) for later in placed[dim + 1 :])
            for offset, (piece, is_there) in enumerate(pieces):
                if not is_there:
                    size, rank = self.size(numel(piece)), rank + 1
                    if size is None:
                        return False
                    steps.append((torch.unsqueeze, (dim + offset,)))
                    steps.append(_broadcast(dim + offset, size, rank))
            if len(pieces) > 1:
                steps.append((torch.flatten, (dim, dim + len(pieces) - 1)))
        return True

    def _expand(self, placed: list[list[Axes]], targets: Dims, full: Sequence[bool] | None, steps: list[Step]) -> bool:
        for dim, (units, target) in enumerate(zip(placed, targets)):
            if full is not None and full[dim] and target and not units:
                size = self.size(numel(target))
                if size is None:
                    return False
                steps.append(_broadcast(dim, size, len(placed)))
        return True


def _ratio(whole: Size, part: Size) -> int | None:
    """How often a symbolic size is contained in another, if that is a number."""
    if type(whole) is int or type(part) is int:
        return None
    if same_size(whole, part):
        return 1
    quotient = whole.node.expr / part.node.expr  # type: ignore[union-attr]
    return int(quotient) if quotient.is_Integer and quotient > 0 else None


def _broadcast(dim: int, size: object, rank: int) -> Step:
    """A dimension of size 1 broadcast to `size`."""
    return torch.broadcast_to, (tuple(size if i == dim else -1 for i in range(rank)),)


def _contains(target: Axes, axes: Axes) -> bool:
    """Whether the axes follow each other in the target."""
    if axes[0] not in target:
        return False
    start = target.index(axes[0])
    return target[start : start + len(axes)] == axes


def _pieces(units: list[Axes], target: Axes) -> list[tuple[Axes, bool]]:
    """The target as the units that are there and, between them, the axes that are not."""
    pieces: list[tuple[Axes, bool]] = []
    starts = {unit[0]: unit for unit in units}
    position = 0
    while position < len(target):
        unit = starts.get(target[position])
        if unit is None:
            pieces.append(((target[position],), False))
            position += 1
        else:
            pieces.append((unit, True))
            position += len(unit)
    return pieces
