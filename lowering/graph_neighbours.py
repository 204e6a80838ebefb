"""What stands around the node being lowered, and what a kernel in its place would keep Inductor from fusing."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infuse.lowering import inductor

_VIEWS = {
    "view",
    "reshape",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "permute",
    "transpose",
    "slice",
    "select",
    "expand",
}


@functools.cache
def _is_fusable(target: object) -> bool:
    """Whether Inductor generates code for an operator that can share a kernel with its producer."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise in target.tags or torch.Tag.reduction in target.tags:
        return True
    name = target._schema.name
    return name in ("prims::convert_element_type", "aten::sum", "aten::mean", "aten::amax", "aten::clone", "aten::cat")


def is_view(target: object) -> bool:
    """Whether an operator of the graph that is lowered makes a view, or takes one result of several."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2] in _VIEWS
    return target is operator.getitem


def readers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes that read a value, through views."""
    found: list[torch.fx.Node] = []
    for user in node.users:
        found.extend(readers(user) if is_view(user.target) else [user])
    return found


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a kernel would cut apart, in passes over one tensor that the decomposition saves by fusing.

    producer_passes: for each input 0 when it is in memory anyway; 1 when its producer could be fused but the input is
        written in any case, because others read it; 2 when fusion would also save writing it.
    consumer_passes: likewise for what reads each result, and 1 for a result that nothing reads.
    """

    producer_passes: int
    consumer_passes: int

    @property
    def passes(self) -> int:
        return self.producer_passes + self.consumer_passes


def neighbours(
    tensors: Sequence[Any], node: torch.fx.Node, results: int = 1, first: torch.fx.Node | None = None
) -> Neighbours:
    """What could fuse with the operator `node`, whose first arguments are `tensors`, and its first `results`.

    A None among the tensors: the kernel does what produces it. first: what the kernel computes instead of its first
    result, a node behind that.
    """
    producer = 0
    for tensor, argument in zip(tensors, node.args):
        if inductor.is_generated(tensor):
            producer += 2 if len(readers(argument)) == 1 else 1  # type: ignore[arg-type]
    taken = {user.args[1]: readers(user) for user in node.users if user.target is operator.getitem}
    if first is not None:
        taken[0] = readers(first)
    if not taken:
        return Neighbours(producer, _consumer_passes(readers(node)))
    return Neighbours(producer, sum(_consumer_passes(taken.get(index, [])) for index in range(results)))


def _consumer_passes(readers: Sequence[torch.fx.Node]) -> int:
    if not readers:
        return 1
    fusable = [_is_fusable(reader.target) for reader in readers]
    return 0 if not any(fusable) else 2 if all(fusable) else 1


def results_taken(node: torch.fx.Node) -> int:
    """How many of the results of an operator with several are read."""
    return len({user.args[1] for user in node.users if user.target is operator.getitem})
