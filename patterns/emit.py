"""Puts an operator into the graph in place of a site, with metadata, and removes what became dead."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.canonical import CanonicalGraph, is_assertion
from infuse.patterns.sites import Make, Refusal, Site
from infuse.patterns.sizes import same_shape
from infuse.report import SITE_KEY, Placement

_VALUE_KEYS = (*metadata.KEYS, "tensor_meta", "from_node")
# How many nodes may get new strides before the operator's result is laid out as the source's instead.
_MAX_RESTRIDED = 64
# Products lie contiguously, whatever their factors' strides. Evaluated without gradients, matmul fixes the sizes of
# symbolic shapes (torch 2.11).
_CONTIGUOUS = ("matmul", "bmm")
# What torch raises for arguments that do not fit; NotImplementedError is a RuntimeError.
_REJECTIONS = (RuntimeError, TypeError, ValueError)


class Emitter:
    """Replaces sites one after another; remembers what each replaced node became."""

    def __init__(self, view: CanonicalGraph, mode: FakeTensorMode) -> None:
        self.view = view
        self.mode = mode
        self.replaced: dict[Node, Node] = {}
        self.dead: set[Node] = set()
        # What the site's `Make`s became: one that stands twice among the arguments is made once.
        self._made: dict[int, Node] = {}

    def examples(self, site: Site) -> tuple[object, ...] | Refusal:
        """The example values of the operator's arguments."""
        try:
            with metadata.undisturbed(self.mode):
                examples = tuple(self._example(arg) for arg in site.args)
        except _REJECTIONS as error:
            return _gap(site, f"its arguments cannot be made: {error}")
        if any(isinstance(value, Tensor) and is_batchedtensor(value) for value in examples):
            node = site.outputs[0]
            return Refusal(site.kind, node, "it lies inside torch.vmap", "call the module on the whole batch")
        return examples

    def _example(self, arg: object) -> Any:
        if isinstance(arg, Node):
            return metadata.value(self.replaced.get(arg, arg))
        if isinstance(arg, Make):
            return metadata.evaluate(arg.target, [self._example(item) for item in arg.args], {})
        if isinstance(arg, (tuple, list)):
            return type(arg)(self._example(item) for item in arg)
        return arg

    def emit(
        self, site: Site, placement: Placement, examples: tuple[object, ...], identity: str = ""
    ) -> Refusal | None:
        """Adds the operator and reroutes the site's outputs; a refusal, and no change, if its result would differ.

        identity: the site's, which the operator carries to the lowering.
        """
        target = getattr(getattr(torch.ops.infuse, site.kind), placement.overload)
        try:
            with metadata.undisturbed(self.mode):
                result = metadata.evaluate(target, examples, {})
                finished = self._finished(site, result)
        except _REJECTIONS as error:
            return _gap(site, f"the operator rejects it: {error}")
        results = finished if isinstance(finished, (tuple, list)) else (finished,)
        difference = _difference(site, results)
        if difference:
            return _gap(site, f"the operator would change the result: {difference}")
        root = site.outputs[0]
        self._made.clear()
        graph = self.view.graph
        with graph.inserting_before(site.before):
            node = graph.call_function(target, tuple(self._argument(arg, root) for arg in site.args))
            _describe(node, root, result)
            # Of all metadata, AOTAutograd hands "custom" on to what it traces a node to, on torch 2.11 and 2.13.
            node.meta["custom"] = {**node.meta.get("custom", {}), SITE_KEY: identity}
            if isinstance(result, (tuple, list)):
                nodes = [self._call(operator.getitem, (node, i), root, item) for i, item in enumerate(results)]
            else:
                for step, rest in site.after:
                    node = self._call(step, (node, *(self._argument(item, root) for item in rest)), root)
                nodes = [node]
            for output, new in zip(site.outputs, nodes):
                self._reroute(output, new, site)
        for write, target in site.writes:
            self._take_over(write, self.replaced.get(target, target))
        self.dead.update(site.interior)
        return None

    def _finished(self, site: Site, result: Any) -> Any:
        """The operator's result after what the site does to it."""
        for step, rest in site.after:
            result = metadata.evaluate(step, [result, *(self._example(item) for item in rest)], {})
        return result

    def _argument(self, arg: object, root: Node) -> Any:
        if isinstance(arg, Node):
            return self.replaced.get(arg, arg)
        if isinstance(arg, Make):
            if id(arg) not in self._made:
                args = tuple(self._argument(item, root) for item in arg.args)
                self._made[id(arg)] = self._call(arg.target, args, root)
            return self._made[id(arg)]
        if isinstance(arg, (tuple, list)):
            return type(arg)(self._argument(item, root) for item in arg)
        return arg

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...], root: Node, value: Any = None) -> Node:
        node = self.view.graph.call_function(target, args)
        if value is None:
            with metadata.undisturbed(self.mode):
                value = metadata.evaluate(target, torch.fx.map_arg(args, lambda arg: metadata.value(arg)), {})
        _describe(node, root, value)
        return node

    def _reroute(self, old: Node, new: Node, site: Site) -> None:
        """All users of `old` but the site's own nodes read `new`, laid out as `old` where that could matter to them."""

        def is_served(user: Node) -> bool:
            return user not in site.interior and not is_assertion(user)

        if not self._adopt_strides(old, new, is_served):
            new = self._lay_out(new, metadata.value(old), site.outputs[0])
        old.replace_all_uses_with(new, delete_user_cb=is_served)
        # A matcher that looks through aliases names the same value by an earlier node.
        names = [old]
        names.append(self.view.strip(old, trail=names))
        self.replaced.update((name, new) for name in names if name is old or name in site.interior)

    def _take_over(self, write: Node, target: Node) -> None:
        """Erases a node whose writing an operator does now; who read its result reads what it wrote to."""
        write.replace_all_uses_with(target)
        self.replaced[write] = target
        self.view.graph.erase_node(write)

    def _adopt_strides(self, old: Node, new: Node, is_served: Callable[[Node], bool]) -> bool:
        """Carries new's strides through the nodes that read it. False if something may depend on the old ones.

        Nothing is changed then. A node whose strides come out as they were ends the search there; a view that cannot be
        taken of the new strides, a node that is not known to be pure, and the graph's output make the old ones matter.
        """
        fresh: dict[Node, Any] = {old: metadata.value(new)}
        pending = [old]
        while pending:
            node = pending.pop()
            if same_strides(metadata.value(node), fresh[node]):
                continue
            for user in node.users:
                if not is_served(user) or self.view.word(user) in _CONTIGUOUS:
                    continue
                if not self.view.word(user) or len(fresh) > _MAX_RESTRIDED:
                    return False
                value = self._again(user, fresh)
                if value is None:
                    return False
                fresh[user] = value
                pending.append(user)
        for node, value in fresh.items():
            if node is not old:
                node.meta[metadata.key(node) or metadata.KEYS[0]] = value
        return True

    def _again(self, node: Node, fresh: dict[Node, Any]) -> Any:
        """The node's example value from fresh ones of its inputs; None if it cannot be computed."""

        def example(arg: Node) -> Any:
            return fresh[arg] if arg in fresh else metadata.value(arg)

        try:
            with metadata.undisturbed(self.mode):
                args: Any = torch.fx.map_arg(node.args, example)
                kwargs: Any = torch.fx.map_arg(node.kwargs, example)
                return metadata.evaluate(node.target, args, kwargs)
        except (*_REJECTIONS, metadata.MissingMetadata):
            return None

    def _lay_out(self, new: Node, like: Tensor, root: Node) -> Node:
        """A copy of `new` whose dimensions lie in memory in the order of `like`'s."""
        order = sorted(range(like.dim()), key=lambda dim: _stride_hint(like, dim), reverse=True)
        inverse = [order.index(dim) for dim in range(like.dim())]
        permuted = self._call(torch.permute, (new, tuple(order)), root)
        dense = self._call(torch.ops.aten.contiguous.default, (permuted,), root)
        return self._call(torch.permute, (dense, tuple(inverse)), root)

    def clean(self) -> None:
        """Erases the nodes that the operators replaced, and what only they read.

        Only nodes of the table of spellings are erased: they are pure. fx's own dead code elimination would also take
        an in-place method call whose result nobody reads, such as a cache's position counter.
        """
        pending = sorted(self.dead, key=lambda node: self.view.index[node])
        while pending:
            node = pending.pop()
            assertions = [user for user in node.users if is_assertion(user)]
            if node._erased or not self.view.word(node) or len(assertions) != len(node.users):
                continue
            for assertion in assertions:
                self.view.graph.erase_node(assertion)
            inputs = node.all_input_nodes
            self.view.graph.erase_node(node)
            pending.extend(sorted(inputs, key=lambda item: self.view.index.get(item, -1)))


def same_strides(left: Any, right: Any) -> bool:
    """Whether two example values are laid out alike; sizes of 1 have no stride. True for things other than tensors."""
    if isinstance(left, (tuple, list)):
        return all(same_strides(a, b) for a, b in zip(left, right))
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return True
    pairs = [
        (left.stride(dim), right.stride(dim))
        for dim in range(left.dim())
        if not (type(left.shape[dim]) is int and left.shape[dim] == 1)
    ]
    return same_shape([a for a, _ in pairs], [b for _, b in pairs])


def _stride_hint(tensor: Tensor, dim: int) -> tuple[int, int]:
    """For sorting dimensions from outer to inner."""
    stride = tensor.stride(dim)
    if type(stride) is int:
        return stride, -dim
    node = stride.node  # type: ignore[attr-defined]
    return (int(node.hint) if node.has_hint() else 0), -dim


def _describe(node: Node, root: Node, value: Any) -> None:
    """Metadata of a new node: where it comes from as root's, and its own value."""
    node.meta.update({key: item for key, item in root.meta.items() if key not in _VALUE_KEYS})
    node.meta[metadata.key(root) or metadata.KEYS[0]] = value


def _gap(site: Site, reason: str) -> Refusal:
    """A refusal that the matchers should have made."""
    remedy = "this is a gap in Infuse's own checks: please report the model"
    return Refusal(site.kind, site.outputs[0], reason, remedy, site.spelling)


def _difference(site: Site, results: Iterable[Any]) -> str:
    for output, result in zip(site.outputs, results):
        expected = metadata.value(output)
        if result.dtype != expected.dtype:
            return f"{result.dtype} instead of {expected.dtype}"
        if not same_shape(result.shape, expected.shape):
            return f"shape {tuple(result.shape)} instead of {tuple(expected.shape)}"
        if result.device != expected.device:
            return f"{result.device} instead of {expected.device}"
    return ""
