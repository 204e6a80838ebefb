"""The canonical view of a graph: one name and one set of arguments for every spelling of an operation.

The table of spellings is `vocabulary`. Here the readings that need shapes are finished: dimensions become non-negative,
every transposition becomes `permute`, every reshaping becomes `reshape` (its shape is that of the result), and
conversions become `cast` or `alias`. Shapes, dtypes and devices come from the nodes' metadata, never from the spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from infuse.patterns import metadata
from infuse.patterns.readings import FINISH, Arguments, Call
from infuse.patterns.sizes import Size
from infuse.patterns.vocabulary import ALIASES, Word, lookup

# Export checks dtypes with these after each cast; they read a value without using it.
_ASSERTIONS = frozenset({"_assert_tensor_metadata"})


class CanonicalGraph:
    """Reads a graph's nodes as canonical operations. The graph itself is not changed.

    graph: pre-grad Dynamo graph or pre-dispatch ATen graph. inputs: the example inputs, for graphs without metadata.
    in_place: nodes that are the writing form of a word (`inplace=True`, `out=`), by the word's name.
    """

    def __init__(self, graph: Graph, inputs: Sequence[object] = ()) -> None:
        self.graph = graph
        self.nodes: tuple[Node, ...] = tuple(graph.nodes)
        self.index = {node: position for position, node in enumerate(self.nodes)}
        self.in_place: dict[Node, str] = {}
        self._words: dict[Node, tuple[Word, Arguments]] = {}
        for node in self.nodes:
            self._read(node)
        metadata.complete(self.nodes, frozenset(self._words), inputs)
        self._calls: dict[Node, Call | None] = {}

    def _read(self, node: Node) -> None:
        word = lookup(node)
        arguments = None if word is None else _bind(word, node)
        if word is None or arguments is None:
            return
        if arguments.pop("out", None) is not None or arguments.pop("inplace", False):
            self.in_place[node] = word.name
        else:
            self._words[node] = (word, arguments)

    def word(self, node: Node) -> str:
        """The name in the table, known without metadata; "" for a node that is not in it."""
        return self._words[node][0].name if node in self._words else ""

    def argument(self, node: Node, name: str) -> Any:
        """An argument as it is written, known without metadata; None where there is none."""
        return self._words[node][1].get(name) if node in self._words else None

    def value(self, node: object) -> Any:
        """The example value of a node: fake tensor, number, tuple, or None. Raises MissingMetadata when it has none."""
        return metadata.value(node) if isinstance(node, Node) else None

    def tensor(self, node: object) -> Tensor | None:
        """The example value if it is a tensor."""
        value = self.value(node)
        return value if isinstance(value, Tensor) else None

    def shape(self, node: object) -> tuple[Size, ...]:
        """The shape of a tensor node; () for anything else."""
        tensor = self.tensor(node)
        return () if tensor is None else tuple(tensor.shape)

    def dtype(self, node: object) -> torch.dtype | None:
        """The dtype of a tensor node."""
        tensor = self.tensor(node)
        return None if tensor is None else tensor.dtype

    def call(self, node: object, *names: str) -> Call | None:
        """The node as a canonical operation, if it is one of `names` (any one if none is given)."""
        if not isinstance(node, Node) or node not in self._words:
            return None
        if node not in self._calls:
            self._calls[node] = self._finish(node)
        found = self._calls[node]
        return found if found is not None and (not names or found.name in names) else None

    def _finish(self, node: Node) -> Call | None:
        word, arguments = self._words[node]
        arguments = dict(arguments)
        rank = len(self.shape(arguments.get("input")))
        for name in word.dims:
            dims = _dims(arguments.get(name), rank)
            if dims is None:
                return None
            arguments[name] = dims
        finish = FINISH.get(word.name)
        return Call(word.name, arguments) if finish is None else finish(self, node, arguments)

    def operands(self, node: object, name: str) -> tuple[Any, Any] | None:
        """The two operands of add, sub, mul or div; None when there is a factor (alpha) or a rounding."""
        call = self.call(node, name)
        if call is None or call["rounding_mode"] is not None or call["alpha"] not in (None, 1):
            return None
        return call["input"], call["other"]

    def number(self, value: object) -> float | Node | None:
        """A number, or the node of a symbolic one; None for anything else. With dynamic shapes eps is a SymFloat."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, Node):
            example = self.value(value)
            if isinstance(example, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(example, bool):
                return value
        return None

    def is_zero(self, value: object) -> bool:
        """Whether a dropout probability is 0.

        Under dynamic shapes it is a symbolic float; one that is 0 now is fixed to that by a guard, as torch itself does
        when it traces a dropout. Unlike a size it does not vary from call to call.
        """
        example = self.value(value) if isinstance(value, Node) else value
        if isinstance(example, torch.SymFloat):
            return example.node.has_hint() and example.node.hint == 0 and bool(example == 0)
        return isinstance(example, (int, float)) and example == 0

    def strip(self, node: Any, *, widening: bool = False, trail: list[Node] | None = None) -> Any:
        """Looks through nodes that return their input's values, and with `widening` through casts that lose nothing.

        The nodes that were looked through are appended to `trail`.
        """
        while (call := self.call(node, "alias", "cast")) is not None:
            if call.name == "cast" and not (widening and self.widens(node)):
                return node
            if trail is not None:
                trail.append(node)
            node = call["input"]
        return node

    def narrowed(self, node: Any, trail: list[Node]) -> Any:
        """The narrowest tensor with the same values: the input of the innermost cast that loses nothing."""
        while True:
            skipped: list[Node] = []
            plain = self.strip(node, trail=skipped)
            if self.call(plain, "cast") is None or not self.widens(plain):
                return node
            trail += [*skipped, plain]
            node = plain.args[0]

    def same_value(self, left: Any, right: Any, trail: list[Node]) -> bool:
        """Whether two nodes hold the same values, dtypes aside; what was looked through is appended to `trail`."""
        if left is right:
            return isinstance(left, Node)
        seen: list[Node] = []
        same = self.strip(left, widening=True, trail=seen) is self.strip(right, widening=True, trail=seen)
        if same:
            trail += seen
        return same and isinstance(left, Node)

    def widens(self, node: Node) -> bool:
        """Whether a cast loses nothing."""
        call = self.call(node, "cast")
        before, after = (self.dtype(call["input"]) if call else None), self.dtype(node)
        if before is None or after is None or not (before.is_floating_point and after.is_floating_point):
            return False
        return torch.promote_types(before, after) == after

    def readers(self, node: Node) -> list[Node]:
        """Who uses a value; export's assertions about it do not count."""
        return [user for user in node.users if not is_assertion(user)]

    def only_reader(self, node: Node, trail: list[Node] | None = None) -> tuple[Node, Node] | None:
        """(value, reader): the only reader of the node's value, and the name it reads it under, past nodes that change
        nothing.

        None when several read it or nobody does. Nodes looked through are appended to `trail`.
        """
        while len(readers := self.readers(node)) == 1:
            reader = readers[0]
            if self.call(reader, "alias") is None:
                return node, reader
            if trail is not None:
                trail.append(reader)
            node = reader
        return None


def is_assertion(node: Node) -> bool:
    """Whether a node only checks a value's metadata."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and packet.__name__ in _ASSERTIONS


def _bind(word: Word, node: Node) -> Arguments | None:
    """Arguments by name; None when they do not fit the word."""
    values = list(node.args)
    if word.variadic and len(values) >= len(word.params):
        first = len(word.params) - 1
        rest = values[first:]
        values[first:] = [rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)]
    if node.target is getattr:
        values = values[:1]
    if len(values) > len(word.params):
        return None
    arguments = dict(zip(word.params, values))
    for key, value in node.kwargs.items():
        name = key if key in word.params else ALIASES.get(key, key)
        known = name in word.keywords or (name in word.params and name not in arguments)
        if word.name == "to" or name == "out" or known:
            arguments[name] = value
        elif value is not None:
            return None
    return arguments


def _dims(value: object, rank: int) -> tuple[int, ...] | None:
    """Dimensions as non-negative numbers; all of them for None or (). None when they are no plain numbers."""
    if value is None:
        return tuple(range(rank))
    items = value if isinstance(value, (tuple, list)) else (value,)
    if not items:
        return tuple(range(rank))
    if rank == 0 or not all(type(item) is int and -rank <= item < rank for item in items):
        return None
    return tuple(item % rank for item in items)
