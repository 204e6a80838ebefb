"""Lookups of rows in training, whose gradients can be leaner than Inductor's.

F.embedding(indices, weight)                  without a limit on norms, gradients scaled by frequency or sparse ones
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from infuse.ops import embedding as _op_embedding  # noqa: F401  importing an operator's module registers it
from infuse.patterns import metadata
from infuse.report import Placement

KIND = "embedding"
_SIGNATURE = inspect.signature(F.embedding)


def replace(graph: Graph, place: Callable[[str, tuple[object, ...], bool], Placement], training: bool) -> int:
    """Puts infuse::embedding where the lowering asks for it; returns how many there are."""
    found = [node for node in graph.nodes if node.target is F.embedding] if training else []
    return sum(_replaced(node, place) for node in found)


def _replaced(node: Node, place: Callable[[str, tuple[object, ...], bool], Placement]) -> bool:
    given = _SIGNATURE.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    arguments: dict[str, Any] = given.arguments
    if arguments["max_norm"] is not None or arguments["scale_grad_by_freq"] or arguments["sparse"]:
        return False
    weight, indices = (_tensor(arguments[name]) for name in ("weight", "input"))
    if weight is None or indices is None or not place(KIND, (weight, indices), True).overload:
        return False
    padding_idx = arguments["padding_idx"]
    padding_idx = -1 if padding_idx is None else padding_idx % weight.shape[0]
    node.target = torch.ops.infuse.embedding.default
    node.args, node.kwargs = (arguments["weight"], arguments["input"], padding_idx), {}
    return True


def _tensor(node: object) -> Tensor | None:
    """The example value of a node that is a tensor and nothing more: a subclass may spread its rows over processes."""
    try:
        value = metadata.value(node) if isinstance(node, Node) else None
    except metadata.MissingMetadata:
        return None
    is_plain = type(value) in (Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor)
    return value if is_plain else None
