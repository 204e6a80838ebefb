"""Weights that are constants of a graph, laid behind one another in memory once, while it is compiled.

Each parameter stays the object that it is, with the same values, shape and strides; its storage becomes a slice of the
packed one, and the old storage is freed. So nothing is kept twice and a state_dict is what it was. Loading new values
writes them into the slices; but a frozen graph holds what torch made of the constants, packed or not, and is to be
compiled again then.

Refused is whatever could notice: memory that something else holds too (a tied or shared tensor, a state_dict that is
kept, a graph that was compiled before, whose CUDA graph would read freed memory), subclasses, hooks, gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.linears import Linear

# A tensor, and the wrapper of its storage that counting takes.
_ONE_OWNER = 2


def constant(node: Node) -> Tensor | None:
    """The tensor that a get_attr node of the graph reads; None for anything else."""
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None) if node.op == "get_attr" and owner is not None else None
    return value if isinstance(value, Tensor) else None


def is_fake(linears: Sequence[Linear]) -> bool:
    """Whether the graph is only looked at, with weights that have no memory."""
    return any(isinstance(constant(linear.weight), FakeTensor) for linear in linears)


def obstacle(linears: Sequence[Linear]) -> str:
    """Why the weights of linears cannot be packed, "" if they can or are already."""
    if torch.is_grad_enabled():
        return "gradients are enabled: compile under torch.no_grad() or torch.inference_mode()"
    nodes = [node for linear in linears for node in (linear.weight, linear.bias) if node is not None]
    readers = {linear.node for linear in linears}
    names = Counter(node.target for node in linears[0].node.graph.find_nodes(op="get_attr"))
    if any(names[node.target] > 1 or nodes.count(node) > 1 or not readers.issuperset(node.users) for node in nodes):
        return "a weight is read elsewhere too (tied)"
    if any(constant(node) is None for node in nodes):
        return "a weight is no tensor of the graph's module"
    weights = [tensor for linear in linears if (tensor := constant(linear.weight)) is not None]
    return "" if is_fake(linears) or _are_adjacent(weights) else _obstacle(weights)


def _obstacle(tensors: Sequence[Tensor]) -> str:
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return "a weight is a tensor subclass (sharded or quantised)"
    if len({tensor.device for tensor in tensors}) > 1 or tensors[0].device.type == "meta":
        return "the weights are on several devices, or on none"
    if any(tensor.grad is not None or _has_hooks(tensor) for tensor in tensors):
        return "a weight has a gradient or a hook"
    for tensor in tensors:
        storage = tensor.untyped_storage()
        is_whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.itemsize
        if not is_whole or not storage.resizable() or (tensor.device.type == "cpu" and storage.is_shared()):
            return "a weight is part of a larger tensor, or lies in shared or mapped memory"
        if torch._C._storage_Use_Count(storage._cdata) > _ONE_OWNER:
            return "something else holds a weight's memory: a tied tensor, a state_dict, a graph compiled before"
    return ""


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def _are_adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether they lie behind one another in one storage."""
    end = weights[0].storage_offset()
    for weight in weights:
        same = weight.untyped_storage()._cdata == weights[0].untyped_storage()._cdata
        if not (same and weight.is_contiguous() and weight.storage_offset() == end):
            return False
        end += weight.numel()
    return True


@dataclass(frozen=True, slots=True)
class Packed:
    """weight, bias: the nodes of the packed ones, which were the first linear's (the first bias's).

    sizes: rows of each linear. replaced: what the graph's module had under their names. unread: nodes that nobody reads
    once the operator is there.
    """

    weight: Node
    bias: Node | None
    sizes: tuple[int, ...]
    replaced: tuple[tuple[Node, Tensor, Any], ...]
    unread: tuple[Node, ...]

    def undo(self) -> None:
        """Gives the nodes back what they had; the weights stay where they are, with the same values."""
        for node, tensor, example in self.replaced:
            _assign(node, tensor)
            node.meta[metadata.key(node) or metadata.KEYS[0]] = example

    def clean(self) -> None:
        """Erases the nodes that nobody reads any more, and what the graph's module has under their names."""
        for node in self.unread:
            if not node.users:
                node.graph.erase_node(node)
                delattr(node.graph.owning_module, str(node.target))


def pack(linears: Sequence[Linear], mode: FakeTensorMode) -> Packed:
    """Packs what `obstacle` has nothing against. Biases are small, and are copied."""
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    values = [tensor for node in weights if (tensor := constant(node)) is not None]
    given = [None if node is None else constant(node) for node in biases]
    sizes = tuple(int(tensor.shape[0]) for tensor in values)
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        weight = _one_storage(values)
        whole = [weight.new_zeros(n) if item is None else item for n, item in zip(sizes, given)]
        bias = torch.cat(whole) if any(item is not None for item in given) else None
    first_bias = next((node for node in biases if node is not None), None)
    replaced = [_replace(weights[0], weight, mode)]
    if first_bias is not None and bias is not None:
        replaced.append(_replace(first_bias, bias, mode))
    own = (weights[0], first_bias)
    unread = tuple(node for node in (*weights, *biases) if node is not None and node not in own)
    return Packed(weights[0], first_bias, sizes, tuple(replaced), unread)


def _one_storage(weights: Sequence[Tensor]) -> Tensor:
    """[sum F, D]: where the weights lie already, or new memory, slices of which become theirs."""
    first = weights[0]
    shape = (sum(weight.shape[0] for weight in weights), first.shape[1])
    if _are_adjacent(weights):
        whole = first.new_empty(0)
        return whole.set_(first.untyped_storage(), first.storage_offset(), shape, (first.shape[1], 1))
    packed = first.new_empty(shape)
    for weight, part in zip(weights, packed.split([weight.shape[0] for weight in weights])):
        part.copy_(weight)
        weight.data = part
    return packed


def _replace(node: Node, tensor: Tensor, mode: FakeTensorMode) -> tuple[Node, Tensor, Any]:
    """Gives a node another tensor; what it had before."""
    before = node, _assign(node, tensor), metadata.value(node)
    node.meta[metadata.key(node) or metadata.KEYS[0]] = mode.from_tensor(tensor, static_shapes=True)
    return before


def _assign(node: Node, tensor: Tensor) -> Tensor:
    owner: Any = node.graph.owning_module
    before: Tensor = getattr(owner, str(node.target))
    delattr(owner, str(node.target))
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    setattr(owner, str(node.target), tensor if is_parameter else torch.nn.Parameter(tensor, requires_grad=False))
    return before
