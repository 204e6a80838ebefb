"""Example values of nodes: reading them, and computing those that are missing.

Dynamo stores a fake tensor under "example_value", export under "val". Some passes that run before ours retrace the
graph and lose them (freezing in torch 2.11 does); then the graph is run on fake tensors first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Node

KEYS = ("example_value", "val")


class MissingMetadata(Exception):
    """A node has no example value, so that nothing can be proven about it."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"node {node.name!r} ({node.op} {node.target}) has no example value")
        self.node = node


def key(node: Node) -> str | None:
    """Where a node keeps its example value."""
    return next((key for key in KEYS if key in node.meta), None)


def value(node: Node) -> Any:
    """A node's example value. Raises MissingMetadata."""
    for name in KEYS:
        if name in node.meta:
            return node.meta[name]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        with contextlib.suppress(AttributeError):
            return _attribute(node)
    raise MissingMetadata(node)


def _attribute(node: Node) -> Any:
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def fake_mode(nodes: Sequence[Node]) -> FakeTensorMode | None:
    """The mode that the graph's fake tensors belong to."""
    for node in nodes:
        for example in _leaves(next((node.meta[name] for name in KEYS if name in node.meta), None)):
            if isinstance(example, FakeTensor):
                return example.fake_mode
    context = torch._guards.TracingContext.try_get()
    return context.fake_mode if context is not None else None


def _leaves(example: Any) -> Sequence[Any]:
    return example if isinstance(example, (tuple, list)) else (example,)


@contextlib.contextmanager
def undisturbed(mode: FakeTensorMode) -> Iterator[None]:
    """Fake tensors, no autograd; the grad mode is put back whatever the nodes that run here set it to."""
    with torch.no_grad(), mode:
        yield


@contextlib.contextmanager
def real() -> Iterator[None]:
    """Real tensors, no autograd: for computing with constants while a graph of fake tensors is compiled."""
    with torch.no_grad(), unset_fake_temporarily():
        yield


def evaluate(target: Callable[..., Any] | str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function or, for a string, of a method of the first argument; call it inside `undisturbed`."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def complete(nodes: Sequence[Node], pure: frozenset[Node], inputs: Sequence[object]) -> None:
    """Fills in missing example values where that is possible.

    A graph without any is run from `inputs`. In one that has some, only `pure` nodes are run, and only without autocast
    switches, because what they set cannot be known from the middle of a graph.
    """
    _complete_constants(nodes)
    calls = [node for node in nodes if node.op in ("call_function", "call_method")]
    missing = [node for node in calls if key(node) is None]
    if not any(node in pure for node in missing) or (mode := fake_mode(nodes)) is None:
        return
    placeholders = [node for node in nodes if node.op == "placeholder"]
    if all(key(node) is not None for node in placeholders):
        switches = any("autocast" in getattr(node.target, "__name__", "") for node in calls)
        missing = [] if switches else [node for node in missing if node in pure]
    elif len(inputs) == len(placeholders) and len(missing) == len(calls):
        for node, example in zip(placeholders, inputs):
            node.meta.setdefault(KEYS[0], _fake(example, mode))
    else:
        return
    with undisturbed(mode):
        for node in missing:
            _run(node, mode)


def _complete_constants(nodes: Sequence[Node]) -> None:
    """Fake tensors for the constants of a graph that lost its example values."""
    constants = [node for node in nodes if node.op == "get_attr" and key(node) is None]
    if not constants or (mode := fake_mode(nodes)) is None:
        return
    for node in constants:
        with contextlib.suppress(MissingMetadata):
            found = value(node)
            if isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor):
                node.meta[KEYS[0]] = mode.from_tensor(found, static_shapes=True)


def _run(node: Node, mode: FakeTensorMode) -> None:
    def example(argument: Node) -> Any:
        return _fake(value(argument), mode)

    # What fails on fake tensors leaves the node without a value, which `value` reports to the matcher that asks.
    with contextlib.suppress(MissingMetadata, RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
        args: Any = torch.fx.map_arg(node.args, example)
        kwargs: Any = torch.fx.map_arg(node.kwargs, example)
        if callable(node.target) or node.op == "call_method":
            node.meta[KEYS[0]] = evaluate(node.target, args, kwargs)


def _fake(example: Any, mode: FakeTensorMode) -> Any:
    if isinstance(example, torch.Tensor) and not isinstance(example, FakeTensor):
        return mode.from_tensor(example)
    return example
