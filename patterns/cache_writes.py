"""Writes into a static KV cache: k or v put at given positions along the sequence, in place.

    cache[:, :, positions] = value                        torchtune, gpt-fast
    cache.index_copy_(2, positions, value)                Hugging Face's StaticCache
    aten.index_put_(cache, [None, None, positions], value), aten.index_copy_(...)

cache [batch, heads, cache_len, D], an input of the graph; positions [seq_len], int64 or int32; value [batch, heads,
seq_len, D] in the cache's dtype, nothing broadcast.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.safety import storages as storages_of
from infuse.patterns.sizes import same_shape

_SEQUENCE = 2  # the dimension of positions
_RANK = 4
_INDICES = (torch.int64, torch.int32)
_INDEX_COPY = ("index_copy_", torch.Tensor.index_copy_, torch.ops.aten.index_copy_.default)
_INDEX_PUT = ("index_put_", torch.Tensor.index_put_, torch.ops.aten.index_put_.default)
_SET_ITEM = ("__setitem__", operator.setitem, torch.Tensor.__setitem__)


@dataclass(frozen=True, slots=True)
class CacheWrite:
    """node: what writes; who reads it reads the cache. view: what the value goes through on its way, if anything."""

    node: Node
    cache: Node
    positions: Node
    value: Node
    view: Node | None = None


def read_cache_write(view: CanonicalGraph, node: Node) -> CacheWrite | None:
    """The write that a node is, if it is one."""
    if node.op not in ("call_function", "call_method"):
        return None
    found: tuple[Any, Any, Any] | None = None
    if node.target in _SET_ITEM and len(node.args) == 3 and not node.kwargs:
        found = _set_item(*node.args)
    elif node.target in _INDEX_COPY:
        found = _index_copy(node)
    elif node.target in _INDEX_PUT:
        found = _index_put(node)
    if found is None or not all(isinstance(part, Node) for part in found):
        return None
    write = _with_batch(view, CacheWrite(node, *found))
    return write if _fits(view, write) else None


def _with_batch(view: CanonicalGraph, write: CacheWrite) -> CacheWrite:
    """The write of the value as it was before its batch of one was dropped, which torch does to what is assigned."""
    call = view.call(write.value, "reshape")
    if call is None:
        return write
    before, after = view.shape(call["input"]), view.shape(write.value)
    is_dropped = len(before) == _RANK and same_shape(before, (1, *after))
    return replace(write, value=call["input"], view=write.value) if is_dropped else write


def _set_item(cache: Any, index: Any, value: Any) -> tuple[Any, Any, Any] | None:
    items = list(index) if isinstance(index, (tuple, list)) else []
    while items and (items[-1] is Ellipsis or items[-1] == slice(None)):
        items.pop()
    rest = len(index) - len(items) if items else 0
    is_plain = len(items) == _SEQUENCE + 1 and all(item == slice(None) for item in items[:_SEQUENCE])
    return (cache, items[_SEQUENCE], value) if is_plain and rest <= _RANK - len(items) else None


def _index_copy(node: Node) -> tuple[Any, Any, Any] | None:
    given = {**dict(zip(("self", "dim", "index", "source"), node.args)), **node.kwargs}
    if set(given) != {"self", "dim", "index", "source"} or given["dim"] not in (_SEQUENCE, _SEQUENCE - _RANK):
        return None
    return given["self"], given["index"], given["source"]


def _index_put(node: Node) -> tuple[Any, Any, Any] | None:
    given = {**dict(zip(("self", "indices", "values", "accumulate"), node.args)), **node.kwargs}
    indices = given.get("indices")
    if given.pop("accumulate", False) is not False or set(given) != {"self", "indices", "values"}:
        return None
    # A slice among them would be no ATen index: those along whole dimensions are None.
    if not isinstance(indices, (tuple, list)) or len(indices) != _SEQUENCE + 1 or any(indices[:_SEQUENCE]):
        return None
    return given["self"], indices[_SEQUENCE], given["values"]


def _fits(view: CanonicalGraph, write: CacheWrite) -> bool:
    """Whether shapes and dtypes are those of a write of whole rows, one for each position."""
    if write.cache.op not in ("placeholder", "get_attr"):
        return False
    cache, positions, value = (view.tensor(node) for node in (write.cache, write.positions, write.value))
    if cache is None or positions is None or value is None:
        return False
    if positions.dtype not in _INDICES or positions.dim() != 1 or cache.dim() != _RANK or cache.dtype != value.dtype:
        return False
    batch, heads, _, dim = cache.shape
    return same_shape(value.shape, (batch, heads, positions.shape[0], dim))


def touches_only_others(view: CanonicalGraph, nodes: Sequence[Node], storages: frozenset[int]) -> bool:
    """Whether it is certain that no node reads or writes the storages, nor hands on a view of them."""
    for node in nodes:
        if node.op not in ("call_function", "call_method", "placeholder", "get_attr"):
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        for touched in (node, *node.all_input_nodes):
            found = storages_of(view.value(touched))
            if -1 in found or found & storages:
                return False
    return True
