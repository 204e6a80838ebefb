"""Whether an operator may stand where a site's nodes stood.

A site reads its tensors at several nodes, the operator reads them all at one. That is the same only if none of them is
written to in between, and if no autocast or grad mode switch separates the site's nodes. Tensors are compared by the
storage of their fake tensors, so that views and aliases count.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.sites import Refusal, Site, arguments_of

_IN_PLACE_NAMES = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "setitem", "delitem"),
)
_IN_PLACE_OPERATORS = frozenset(getattr(operator, name) for name in _IN_PLACE_NAMES)
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE_NAMES)
# They end in an underscore and write to no storage.
_HARMLESS_METHODS = frozenset({"requires_grad_", "retain_grad_"})
# They update running statistics among their arguments.
_UPDATING_FUNCTIONS = frozenset({"batch_norm", "instance_norm"})
# Switches other than autocast and grad mode; nothing may be moved across them.
OTHER_SWITCHES = frozenset(
    {
        "_enter_inference_mode",
        "_exit_inference_mode",
        "_saved_tensors_hooks_disable",
        "_saved_tensors_hooks_enable",
        "_vmap_increment_nesting",
        "_vmap_decrement_nesting",
        "_grad_increment_nesting",
        "_grad_decrement_nesting",
        "_jvp_increment_nesting",
        "_jvp_decrement_nesting",
    }
)
_TORCH_MODULES = ("torch", "_operator", "operator", "builtins", "math", "_functools")


@dataclass(frozen=True, slots=True)
class Write:
    """A node that writes to storages."""

    index: int
    node: Node
    storages: frozenset[int]


class Effects:
    """What in a graph has effects: writes, and the switches that are in force at each node."""

    def __init__(self, view: CanonicalGraph, ambient_grad: bool) -> None:
        self.view = view
        self.writes = list(writes(view))
        self.state = _states(view, ambient_grad)

    def check(self, site: Site) -> Refusal | None:
        """A refusal if the operator cannot stand before `site.before`."""
        position = self.view.index[site.before]
        switches = [self.state[node].switches for node in (site.before, *site.interior)]
        if any(item != switches[0] for item in switches):
            return Refusal(
                site.kind,
                site.outputs[0],
                "an autocast or grad mode switch lies between its operations",
                "put the whole computation inside or outside the autocast or no_grad block",
                site.spelling,
            )
        assert all(self.view.index[node] < position for node in arguments_of(site.args)), (
            f"{site}: argument defined later"
        )
        write = self.conflicting_write(site.interior, position)
        if write is None:
            return None
        return Refusal(
            site.kind,
            site.outputs[0],
            f"{write.node.name} writes in place to a tensor that it reads, between its first and its last operation",
            "write to a new tensor instead of in place, or before or after the whole computation",
            site.spelling,
        )

    def autocast(self, node: Node) -> tuple[Node, ...]:
        """The nodes that entered the autocast regions around a node, outermost first."""
        return self.state[node].regions

    def conflicting_write(self, interior: tuple[Node, ...], position: int) -> Write | None:
        """A write to what `interior` reads or makes, between its reading there and its reading at `position`."""
        if not self.writes:
            return None
        first_use: dict[int, tuple[int, int]] = {}
        for node in interior:
            index = self.view.index[node]
            for touched in (node, *node.all_input_nodes):
                for storage in storages(_known_value(touched)):
                    low, high = first_use.get(storage, (position, position))
                    first_use[storage] = (min(low, index), max(high, index))
        for write in self.writes:
            for storage in write.storages & first_use.keys():
                low, high = first_use[storage]
                if low < write.index < high:
                    return write
        return None


def storages(value: Any) -> frozenset[int]:
    """Ids of the storages behind a tensor, or the tensors of a tuple."""
    if isinstance(value, Tensor):
        try:
            return frozenset({value.untyped_storage()._cdata})
        except (NotImplementedError, RuntimeError):
            return frozenset({-1})  # One unknown storage may be any other unknown one.
    if isinstance(value, (tuple, list)):
        return frozenset[int]().union(*(storages(item) for item in value))
    return frozenset()


def _known_value(node: Node) -> Any:
    try:
        return metadata.value(node)
    except metadata.MissingMetadata:
        return None


def writes(view: CanonicalGraph) -> Iterator[Write]:
    """The nodes that write to storages, in order."""
    for index, node in enumerate(view.nodes):
        targets = [] if view.word(node) else _written(view, node)
        touched = frozenset[int]().union(*(storages(_known_value(target)) for target in targets))
        if touched:
            yield Write(index, node, touched)


def _written(view: CanonicalGraph, node: Node) -> list[Node]:
    """The arguments that a node writes to; all of them when that is not known."""
    out = node.kwargs.get("out")
    written = list(arguments_of(out)) if out is not None else []
    first = list(arguments_of(node.args[:1]))
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op == "call_method":
        name = str(node.target)
        in_place = name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
        return written + (first if in_place and name not in _HARMLESS_METHODS else [])
    if node.op != "call_function":
        return []
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return written + _written_by_operator(target, node)
    name = getattr(target, "__name__", "")
    if target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")) or _asks_in_place(node):
        return written + first
    module = getattr(target, "__module__", None) or "torch"
    known = module.split(".")[0] in _TORCH_MODULES and not isinstance(target, torch._ops.HigherOrderOperator)
    return written if known and name not in _UPDATING_FUNCTIONS else node.all_input_nodes


def _written_by_operator(target: torch._ops.OpOverload | torch._ops.OpOverloadPacket, node: Node) -> list[Node]:
    overloads = (
        [target]
        if isinstance(target, torch._ops.OpOverload)
        else [getattr(target, name) for name in target.overloads()]
    )
    written: list[Node] = []
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                written += arguments_of(value)
    return written


def _asks_in_place(node: Node) -> bool:
    if node.kwargs.get("inplace"):
        return True
    position = _in_place_parameter(node.target)
    return position is not None and len(node.args) > position and bool(node.args[position])


@functools.cache
def _in_place_parameter(target: Callable[..., Any]) -> int | None:
    """Where a function of torch.nn.functional takes `inplace`."""
    if getattr(target, "__module__", "") != "torch.nn.functional":
        return None
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


@dataclass(frozen=True, slots=True)
class State:
    """What is in force at a node. regions: the nodes that entered the autocast regions around it, outermost first.

    switches: the dtypes that autocast casts to by device, grad mode, how many other switches came before. Two nodes
    with equal ones compute the same, also where a region lies between them that changes nothing.
    """

    regions: tuple[Node, ...]
    switches: tuple[object, ...]


def _states(view: CanonicalGraph, ambient_grad: bool) -> dict[Node, State]:
    """The state at each node. Around the graph autocast is as it is now, since Dynamo restores it for a backend."""
    regions: tuple[Node, ...] = ()
    dtypes: dict[str, object] = {}
    grad, others = ambient_grad, 0
    states: dict[Node, State] = {}
    for node in view.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_enter_autocast":
            regions = (*regions, node)
            dtypes = _autocast_dtypes(regions)
        elif name == "_exit_autocast":
            regions = tuple(region for region in regions if region is not node.args[0])
            dtypes = _autocast_dtypes(regions)
        elif name == "_set_grad_enabled" and isinstance(node.args[0], bool):
            grad = node.args[0]
        elif name in OTHER_SWITCHES:
            others += 1
        states[node] = State(regions, (tuple(sorted(dtypes.items(), key=str)), grad, others))
    return states


def _autocast_dtypes(regions: tuple[Node, ...]) -> dict[str, object]:
    """The dtype that each region's device casts to, None where autocast is off, for devices that change from around."""
    dtypes: dict[str, object] = {}
    for region in regions:
        device, dtype, enabled, *_ = region.args
        dtypes[str(device)] = (dtype or torch.get_autocast_dtype(str(device))) if enabled else None
    return {device: dtype for device, dtype in dtypes.items() if dtype != _ambient_autocast(device)}


def _ambient_autocast(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to around the graph, None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
