"""Sums before and behind an operator that is being lowered, which its kernel can take over, in Inductor's terms.

Like infuse.lowering.inductor, whose part this is, it may import Inductor's private names.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.utils import sympy_index_symbol
from torch._inductor.virtualized import V

from infuse.lowering import graph_neighbours, inductor

Node = Any  # an Inductor IR node
Expression = Any  # of sympy


@dataclass(frozen=True, slots=True)
class _Loads:
    """The elements that are added up: (buffer, index)."""

    places: tuple[tuple[str, Expression], ...]


class _SumOfLoads(DefaultHandler):
    """Runs the code of a value: gives its _Loads if it is a sum, None for anything else."""

    def load(self, name: str, index: Expression) -> Any:
        return _Loads(((name, index),))

    def add(self, x0: Any, x1: Any) -> Any:
        return None if x0 is None or x1 is None else _Loads((*x0.places, *x1.places))

    def to_dtype(self, x: Any, dtype: torch.dtype, src_dtype: Any = None, use_compute_types: bool = True) -> Any:
        return x if dtype == torch.float32 else None  # nothing is lost

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None


def terms(tensor: Node, node: torch.fx.Node, limit: int, dtype: torch.dtype) -> list[Node]:
    """The at most `limit` tensors in memory, of its shape and of `dtype`, whose sum in fp32 is `tensor`, the first
    argument of the operator `node`; itself where it is something else, or where others read it too, so that it is in
    memory anyway.

    Inductor adds in fp32 without rounding in between, which is what a kernel that takes the terms must do.
    """
    (argument,) = (arg for arg in node.args[:1] if isinstance(arg, torch.fx.Node))
    if config.emulate_precision_casts or len(graph_neighbours.readers(argument)) != 1:
        return [tensor]
    if not inductor.is_generated(tensor):
        found = _addends_of_products(tensor, argument) if tensor.get_dtype() == dtype else []
        return found if 2 <= len(found) <= limit else [tensor]
    sizes = tensor.get_size()
    symbols = [sympy_index_symbol(f"infuse_index_{i}") for i in range(len(sizes))]
    with V.set_ops_handler(_SumOfLoads()):
        loads = tensor.make_loader()(symbols).value
    if loads is None or len(loads.places) > limit:
        return [tensor]
    found = [_strided(name, index, symbols, tensor, dtype) for name, index in loads.places]
    return [tensor] if any(term is None for term in found) else found


def _addends_of_products(tensor: Node, node: torch.fx.Node) -> list[Node]:
    """What addmm(addmm(a, b, c), d, e) adds up, where nothing else reads the partial sums: a, b @ c, d @ e.

    Inductor's pass makes these calls of sums of products whose reader is not pointwise, an operator for instance. Each
    copies its first argument, which costs two passes over it.
    """
    storage = tensor.data if isinstance(tensor, ir.TensorBox) else tensor
    product = storage.data if isinstance(storage, ir.StorageBox) else None
    plain = node.target is torch.ops.aten.addmm.default and not node.kwargs and len(graph_neighbours.readers(node)) == 1
    if not plain or not isinstance(product, ir.ExternKernelOut):
        return [tensor]
    assert isinstance(node.args[0], torch.fx.Node)
    inputs: Any = product.inputs
    first, *factors = (
        ir.TensorBox(value if isinstance(value, (ir.BaseView, ir.StorageBox)) else ir.StorageBox(value))
        for value in inputs
    )
    sizes = zip(first.get_layout().stride, first.get_size(), tensor.get_size())
    if any(not V.graph.sizevars.statically_known_equals(*pair) or stride == 0 for stride, *pair in sizes):
        return [tensor]  # a bias
    return [*_addends_of_products(first, node.args[0]), lowerings[torch.ops.aten.mm.default](*factors)]


def _strided(
    name: str, index: Expression, symbols: Sequence[Expression], like: Node, dtype: torch.dtype
) -> Node | None:
    """A view of a buffer that has `like`'s sizes, if the index is linear and the buffer of the dtype."""
    index = index.expand()
    strides = [index.coeff(symbol) for symbol in symbols]
    offset = (index - sum(stride * symbol for stride, symbol in zip(strides, symbols))).expand()
    linear = not any(expression.free_symbols & set(symbols) for expression in (offset, *strides))
    if not linear or V.graph.get_dtype(name) != dtype:
        return None
    buffer = V.graph.get_buffer(name) or V.graph.graph_inputs[name]
    box = buffer if isinstance(buffer, ir.TensorBox) else ir.TensorBox(ir.StorageBox(buffer))
    storage, _ = ir.as_storage_and_layout(box, freeze=True)
    layout = ir.FixedLayout(like.get_device(), dtype, list(like.get_size()), strides, offset)
    return ir.TensorBox(ir.ReinterpretView(data=storage, layout=layout))


def overwritable(tensors: Sequence[Node], node: torch.fx.Node) -> Node | None:
    """A contiguous view of one of `tensors`, the terms of the first argument of the operator `node`, whose memory a
    kernel may give to a result of its size: an extern kernel's whole result that nothing else reads."""
    equal = V.graph.sizevars.statically_known_equals
    if not _is_read_once(node.args[0]):
        return None
    for tensor in tensors:
        if not ir.is_storage_and_layout(tensor):
            continue
        storage, layout = ir.as_storage_and_layout(tensor, freeze=True)
        size = list(tensor.get_size())
        packed = ir.FixedLayout(layout.device, layout.dtype, size, ir.FlexibleLayout.contiguous_strides(size))
        strides = zip(size, layout.stride, packed.stride)
        contiguous = all(equal(dim, 1) or equal(stride, expected) for dim, stride, expected in strides)
        whole = equal(layout.offset, 0) and equal(storage.data.get_numel(), tensor.get_numel())
        if isinstance(storage.data, ir.ExternKernelOut) and contiguous and whole:
            return ir.TensorBox(ir.ReinterpretView(data=storage, layout=packed))
    return None


def is_donated(tensor: Node) -> bool:
    """Whether a value is an input, whole and contiguous, that the forward saved and that this backward alone sees.

    AOTAutograd tells which inputs are; it raises by itself if such a backward is to run twice (retain_graph).
    """
    storage = tensor.data if isinstance(tensor, ir.TensorBox) else None
    buffer = storage.data if isinstance(storage, ir.StorageBox) else None
    if not isinstance(buffer, ir.DonatedBuffer):
        return False
    expected = ir.FlexibleLayout.contiguous_strides(list(tensor.get_size()))
    equal = V.graph.sizevars.statically_known_equals
    return all(equal(stride, other) for stride, other in zip(buffer.get_layout().stride, expected))


def _is_read_once(value: object) -> bool:
    """Whether a value, and what it is a view or a sum of, is made by operators of the graph for one reader each."""
    if not isinstance(value, torch.fx.Node) or value.op != "call_function" or value.target is operator.getitem:
        return False
    if graph_neighbours.is_view(value.target):
        return len(value.users) == 1 and _is_read_once(value.args[0])
    if value.target in (torch.ops.aten.add.Tensor, torch.ops.aten.addmm.default):
        added = value.args[:1] if value.target is torch.ops.aten.addmm.default else value.args
        return len(graph_neighbours.readers(value)) == 1 and all(map(_is_read_once, added))
    return len(graph_neighbours.readers(value)) == 1


def sum_behind(node: torch.fx.Node) -> tuple[torch.fx.Node, Node] | None:
    """Where the first result of the operator `node` is read by nothing but its sum with another tensor of that shape
    and dtype, which is in memory: the node of the sum, which is contiguous, and that tensor."""
    result = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    if config.emulate_precision_casts or result is None or len(result.users) != 1:
        return None
    (total,) = result.users
    if total.target is not torch.ops.aten.add.Tensor or total.kwargs:
        return None
    others = [arg for arg in total.args if isinstance(arg, torch.fx.Node) and arg is not result]
    if len(others) != 1 or others[0] not in V.graph.env:
        return None
    value, result_value = others[0].meta["val"], result.meta["val"]
    alike = value.shape == result_value.shape and value.dtype == result_value.dtype
    alike = alike and total.meta["val"].is_contiguous()
    other = V.graph.env[others[0]]
    return (total, other) if alike and not inductor.is_generated(other) else None


def replace(node: torch.fx.Node, value: Node) -> None:
    """Gives a node that is still to be lowered its value; it will not be lowered then."""
    V.graph.env[node] = value
