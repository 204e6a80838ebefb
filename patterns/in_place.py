"""In-place arithmetic on temporaries, written as what it is: a new value under the old one's name.

`scores /= 8` and `scores.masked_fill_(mask, -inf)` compute nothing else than `scores / 8`, if nobody can see the
storage but through the tensor itself. Inductor makes them so in any case; done before the matchers run, these read one
spelling less. A write stays as it is if its storage belongs to an input, or if another view of it is read afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from infuse.patterns import metadata
from infuse.patterns.safety import storages

_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_METHODS = ("add_", "sub_", "mul_", "div_", "masked_fill_", "tanh_")


def functionalise(graph: Graph) -> int:
    """Replaces the writes that can be; how many they were."""
    writes = [node for node in graph.nodes if _is_write(node)]
    if not writes:
        return 0
    unrecorded = _unrecorded(graph)
    index = {node: position for position, node in enumerate(graph.nodes)}
    owners = _owners(graph)
    return sum(_replace(node, index, owners) for node in writes if node not in unrecorded)


def _is_write(node: Node) -> bool:
    if not node.args or not isinstance(node.args[0], Node) or "out" in node.kwargs:
        return False
    return (node.op == "call_function" and node.target in _OPERATORS) or (
        node.op == "call_method" and node.target in _METHODS
    )


def _unrecorded(graph: Graph) -> set[Node]:
    """The nodes behind a switch that turned autograd off: a write there keeps a history that a new value lacks."""
    found: set[Node] = set()
    off = False
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            off = node.args[0] is not True
        off = off or name == "_enter_inference_mode"
        if off:
            found.add(node)
    return found


def _owners(graph: Graph) -> dict[int, list[Node]]:
    """The nodes that hold a tensor, by its storage."""
    found: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for storage in storages(_value(node)):
            found.setdefault(storage, []).append(node)
    return found


def _value(node: Node) -> Any:
    try:
        return metadata.value(node)
    except metadata.MissingMetadata:
        return None


def _replace(write: Node, index: dict[Node, int], owners: dict[int, list[Node]]) -> bool:
    target = write.args[0]
    assert isinstance(target, Node)
    keeps = _keeps_dtype(write)
    wide = None if keeps else _wider(write)
    if not (keeps or wide) or not _is_private(write, target, index, owners):
        return False
    if write.op == "call_function":
        write.target = _OPERATORS[write.target]
    else:
        write.target = str(write.target).removesuffix("_")
    position = index[write]
    if wide is not None:
        write = _rounded(write, wide, index)
    target.replace_all_uses_with(write, delete_user_cb=lambda user: index[user] > position)
    return True


def _rounded(write: Node, wide: torch.dtype, index: dict[Node, int]) -> Node:
    """A cast behind a new value in `wide`, to the dtype of what was written to."""
    narrow = _value(write)
    with write.graph.inserting_after(write):
        cast = write.graph.call_method("to", (write, narrow.dtype))
    cast.meta = dict(write.meta)
    value = narrow.detach().to(wide).requires_grad_(narrow.requires_grad)
    write.meta = {**write.meta, metadata.key(write) or "": value}
    index[cast] = index[write]
    write.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return cast


def _wider(write: Node) -> torch.dtype | None:
    """The dtype of the new value where that is wider than the old one's, which it is then rounded to."""
    value, others = _value(write.args[0]), [_value(other) for other in write.args[1:] if isinstance(other, Node)]  # type: ignore[arg-type]
    if len(write.args) != 2 or write.kwargs or len(others) != 1 or write.target in ("masked_fill_", "tanh_"):
        return None
    if not isinstance(value, Tensor) or not isinstance(others[0], Tensor) or _value(write) is None:
        return None
    wide = torch.result_type(value, others[0])
    floats = value.is_floating_point() and others[0].is_floating_point()
    return wide if floats and torch.promote_types(value.dtype, wide) == wide != value.dtype else None


def _keeps_dtype(write: Node) -> bool:
    """Whether the new value has the old one's dtype and shape by itself."""
    value = _value(write.args[0])  # type: ignore[arg-type]
    if not isinstance(value, Tensor) or not value.is_floating_point() or write.target in ("masked_fill_", "tanh_"):
        return isinstance(value, Tensor) and value.is_floating_point()
    for other in (*write.args[1:], *write.kwargs.values()):
        operand = _value(other) if isinstance(other, Node) else other
        if isinstance(operand, Tensor) and torch.result_type(value, operand) != value.dtype:
            return False
        if not isinstance(operand, (Tensor, int, float, torch.SymInt, torch.SymFloat)):
            return False
    return True


def _is_private(write: Node, target: Node, index: dict[Node, int], owners: dict[int, list[Node]]) -> bool:
    """Whether what is written to is a temporary that is seen afterwards under the target's name only."""
    position = index[write]
    ids = storages(_value(target))
    if len(ids) != 1 or -1 in ids or target.op not in ("call_function", "call_method"):
        return False
    for node in _before(owners[next(iter(ids))], index, position):
        if node.op not in ("call_function", "call_method"):
            return False
        if node is not target and any(index[user] > position for user in node.users):
            return False
    return True


def _before(nodes: list[Node], index: dict[Node, int], position: int) -> Iterator[Node]:
    return (node for node in nodes if index[node] < position)
