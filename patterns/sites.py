"""What the matchers answer: a place that can become an operator, or the reason why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Make:
    """A node to be added in front of the operator: target(*args), args being nodes, numbers or `Make`s."""

    target: Callable[..., Any]
    args: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """A place that is provably the operator `kind`.

    outputs: the nodes that the operator's results replace, one a result. before: the node the operator is inserted
    before. args: the operator's arguments: nodes, `Make`s, numbers, None. interior: the nodes whose work the operator
    does, outputs included. spelling: how the author wrote it, in words. rounding: where the source rounds and the
    operator does not, "" if nowhere; numerics="exact" refuses such a site. parts: the sites that a composite one
    stands for. after: what makes the output of the operator's only result, (target, arguments behind the tensor) each.
    writes: nodes that write in place and whose writing the operator does, each with the node that it writes to. They
    are erased with the site, so whoever proposes them has proven that nobody could tell when they happened.
    """

    kind: str
    outputs: tuple[Node, ...]
    before: Node
    args: tuple[object, ...]
    interior: tuple[Node, ...]
    spelling: str
    rounding: str = ""
    parts: tuple[Site, ...] = ()
    after: tuple[tuple[Callable[..., Any], tuple[object, ...]], ...] = ()
    writes: tuple[tuple[Node, Node], ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place that looks like the operator `kind` and stays as it is. remedy: what would change that."""

    kind: str
    node: Node
    reason: str
    remedy: str
    spelling: str = ""


Finding = Site | Refusal


def arguments_of(value: object) -> Iterator[Node]:
    """The nodes in an argument, or a tuple of them."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from arguments_of(item)
    elif isinstance(value, Make):
        yield from arguments_of(value.args)
