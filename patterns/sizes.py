"""Comparing sizes and shapes, symbolic ones included, without adding a guard to the compiled graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt


def same_size(left: Size, right: Size) -> bool:
    """Whether two sizes are equal, without adding a guard."""
    if type(left) is int and type(right) is int:
        return left == right
    return bool(statically_known_true(left == right))


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are equal, without adding a guard."""
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right))


def broadcasts_to(shape: Sequence[Size], target: Sequence[Size]) -> bool:
    """Whether `shape` broadcasts to `target` and enlarges nothing in it."""
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(same_size(a, 1) or same_size(a, b) for a, b in zip(shape, tail))


def plain(size: Size) -> Size:
    """A size as a number if it is one, such as the symbolic quotient 4 * s // s."""
    number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if number is None else int(number)
