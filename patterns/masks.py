"""What an attention mask provably is, read from the nodes that make it.

A bool mask lets query i attend to key j where it is true, a float one is added to the scores. Nothing is taken from
names or shapes alone: a mask that comes in as an input or a buffer stays what it is, a tensor.

A float is taken as "not attended" if it is at most `VANISHING`: beside one score that is attended the softmax gives
such a key the weight 0 exactly, unless the scores themselves are apart by as much. With -inf, and with the smallest
number of a dtype, this holds always. It does not hold in a row without any attended key, where finite constants leave
an average over the values; so a float mask may be replaced by its structure only where `empty_rows` is False.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns import metadata
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.index_algebra import (
    FALSE,
    TRUE,
    All,
    AtMost,
    Coordinate,
    Formula,
    IsZero,
    Linear,
    Quotient,
    atoms,
    lowest,
    of,
    substituted,
)
from infuse.patterns.made_masks import made_value
from infuse.patterns.mask_reader import MaskReader
from infuse.patterns.mask_values import (
    FORMULAS,
    Leaf,
    Number,
    Value,
    as_formula,
    combine,
    leaves,
)
from infuse.patterns.mask_views import aligned, linear
from infuse.patterns.sites import arguments_of
from infuse.patterns.sizes import Size, same_size

# -1e4 as bfloat16 is -9984.
VANISHING = -9.9e3


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """What is proven of a mask over queries i and keys j.

    upper, lower: only keys i + lower <= j <= i + upper are attended to; None: no such bound. The bounds are integers,
    sizes, or elements of tensors such as a cache's position. chunk: only keys of the query's own chunk of that many.
    padding: there is a condition on the key that is the same for all queries. exact: the mask is nothing but these
    together; otherwise they are necessary only, and the tensor says the rest.
    fills: the constants that stand for "not attended" in a float mask. finite: it is a float mask, and no element is
    infinite. empty_rows: False if each query attends to some key; None if that is not known. allowed: for a float mask
    that is 0 where a bool tensor of the graph is true, and a constant of `fills` elsewhere, that tensor.
    """

    all_true: bool = False
    upper: Linear | None = None
    lower: Linear | None = None
    chunk: int | None = None
    padding: bool = False
    exact: bool = False
    fills: frozenset[float] = frozenset()
    finite: bool = False
    empty_rows: bool | None = None
    allowed: Node | None = None

    @property
    def is_causal(self) -> bool:
        """Whether it is j <= i and nothing else."""
        extra = self.lower is not None or self.chunk is not None or self.padding
        return self.exact and self.upper == Linear() and not extra

    @property
    def structure(self) -> str:
        """The proven part in words: "causal", "sliding window 4096", "causal with offset, padding"."""
        if self.all_true:
            return "all true"
        words = []
        lower, upper = self.lower, self.upper
        if lower is not None and upper is not None and not lower.terms and not upper.terms:
            band = f"keys from {lower.constant} to {upper.constant} beside the query"
            words.append(f"sliding window {1 - lower.constant}" if not upper.constant else band)
        else:
            words += ["causal" if upper == Linear() else "causal with offset"] if upper is not None else []
            words += ["bounded below"] if lower is not None else []
        words += [f"chunks of {self.chunk}"] if self.chunk is not None else []
        words += ["padding"] if self.padding else []
        return ", ".join(words)


UNKNOWN = MaskFacts()
_readers: weakref.WeakKeyDictionary[CanonicalGraph, tuple[MaskReader, dict[Any, MaskFacts]]]
_readers = weakref.WeakKeyDictionary()


def facts(view: CanonicalGraph, mask: object, shape: Sequence[Size], readers: Sequence[Node]) -> MaskFacts:
    """What is known of a mask, a node or a `Make`, broadcast to [B, H, S, T], as `readers` read it."""
    reader, known = _reader(view)
    places = [view.index[node] for node in readers]
    nodes = list(arguments_of(mask))
    try:
        versions = {tuple(len(reader.writes_before(node, place)) for node in nodes) for place in places}
        sizes = [linear(size) for size in shape]
        if len(versions) != 1 or None in sizes:
            return UNKNOWN
        key = (mask, tuple(sizes), versions.pop())
        if key not in known:
            reader.begin()
            known[key] = _facts(reader, mask, shape, places[0])
        return known[key]
    except metadata.MissingMetadata:
        return UNKNOWN


def written_since(view: CanonicalGraph, node: Node, reader: Node) -> bool:
    """Whether a tensor is written to by `reader` or behind it, so that a later reading could give something else."""
    own, _ = _reader(view)
    return len(own.writes_before(node, len(view.nodes))) > len(own.writes_before(node, view.index[reader]))


def _reader(view: CanonicalGraph) -> tuple[MaskReader, dict[Any, MaskFacts]]:
    """The reader of a graph, and what it found out."""
    if view not in _readers:
        _readers[view] = MaskReader(view), {}
    return _readers[view]


def _facts(reader: MaskReader, mask: object, shape: Sequence[Size], time: int) -> MaskFacts:
    axes = [_axis(name, size) for name, size in zip("bhij", shape)]
    made = made_value(reader, mask, shape, tuple(axes), time)
    if made is None:
        return UNKNOWN
    value = made[0]
    found = _read_structure(_attended(value, otherwise=True))
    row_reads = _attended(value, otherwise=False)
    numbers = [] if isinstance(value, FORMULAS) else [leaf for leaf, _ in leaves(value)]
    known = [leaf.value for leaf in numbers if isinstance(leaf, Number)]
    plain = isinstance(value, FORMULAS) or _is_plain(value)
    return replace(
        found,
        all_true=found.all_true and plain,
        exact=found.exact and plain,
        fills=frozenset(number for number in known if number <= VANISHING),
        finite=bool(numbers) and len(known) == len(numbers) and all(math.isfinite(number) for number in known),
        empty_rows=False if _reaches_all_rows(row_reads, axes[2], shape) else None,
        allowed=_allowed(reader, mask, value, shape, axes, time) if plain and numbers else None,
    )


def _axis(name: str, size: Size) -> Linear:
    whole = linear(size)
    assert whole is not None
    return Linear() if same_size(size, 1) else of(Coordinate(name, whole))


def _attended(value: Value, otherwise: bool) -> Formula:
    """Where keys are attended to; `otherwise`: what is said of an element about which nothing is known."""

    def attends(leaf: Leaf) -> Formula:
        if isinstance(leaf, Number):
            return FALSE if leaf.value <= VANISHING else TRUE
        return TRUE if otherwise else FALSE

    if isinstance(value, FORMULAS):
        return value
    return as_formula(combine(attends, value))


def _read_structure(formula: Formula) -> MaskFacts:
    if formula == TRUE:
        return MaskFacts(all_true=True, exact=True)
    found = MaskFacts(exact=True)
    for part in formula.parts if isinstance(formula, All) else (formula,):
        found = _with_condition(found, part)
    return found


def _with_condition(found: MaskFacts, part: Formula) -> MaskFacts:
    """The facts together with one more condition."""
    if not _names(part) & {"i"}:
        return replace(found, padding=True)
    if isinstance(part, AtMost):
        terms = {atom.name: factor for atom, factor in part.value.terms if isinstance(atom, Coordinate)}
        rest = Linear(
            frozenset((atom, factor) for atom, factor in part.value.terms if not isinstance(atom, Coordinate)),
            part.value.constant,
        )
        if not _names(AtMost(rest)):
            if terms == {"j": 1, "i": -1} and found.upper is None:
                return replace(found, upper=-rest)
            if terms == {"i": 1, "j": -1} and found.lower is None:
                return replace(found, lower=rest)
    chunk = _chunk(part)
    if chunk is not None and found.chunk is None:
        return replace(found, chunk=chunk)
    return replace(found, exact=False)


def _chunk(part: Formula) -> int | None:
    """The divisor in j // divisor == i // divisor."""
    if not isinstance(part, IsZero) or not part.holds or part.value.constant or len(part.value.terms) != 2:
        return None
    (left, one), (right, other) = part.value.terms
    if not isinstance(left, Quotient) or not isinstance(right, Quotient) or one + other:
        return None
    names = {_only_name(left.dividend), _only_name(right.dividend)}
    return left.divisor if left.divisor == right.divisor and names == {"i", "j"} else None


def _only_name(value: Linear) -> str:
    """The name of a coordinate that is the whole expression."""
    return next((atom.name for atom, _ in value.terms if isinstance(atom, Coordinate) and value == of(atom)), "")


def _names(formula: Formula) -> set[str]:
    return {atom.name for atom in atoms(formula) if isinstance(atom, Coordinate)}


def _reaches_all_rows(formula: Formula, row: Linear, shape: Sequence[Size]) -> bool:
    """Whether key 0, key i or, counted from the end, key T - S + i is attended to by each query i."""
    queries, keys = linear(shape[2]), linear(shape[3])
    if queries is None or keys is None or (lowest(keys) or 0) < 1:
        return False
    gap = keys - queries
    room = lowest(gap)
    places = [Linear(), *([row, row + gap] if room is not None and room >= 0 else [])]
    for place in places:

        def at_place(atom: object, place: Linear = place) -> Linear | None:
            return place if isinstance(atom, Coordinate) and atom.name == "j" else None

        if substituted(formula, at_place) == TRUE:
            return True
    return False


@dataclass(frozen=True, slots=True)
class ProvenMask:
    """The operator's arguments for a mask, after what could be proven of it.

    mask, is_causal, masked_rows: the operator's. words: what was proven. rounding: where the source's constant is not
    quite "not attended", for numerics="exact".
    """

    mask: object
    is_causal: bool
    masked_rows: str
    words: tuple[str, ...]
    rounding: str = ""


def prove(
    view: CanonicalGraph, mask: object, masked_rows: str, shape: Sequence[Size], readers: Sequence[Node]
) -> ProvenMask:
    """The mask in the cheapest form that is provably the same: none, `is_causal`, a bool mask, or as it is.

    mask: a node or a `Make` that broadcasts to shape [B, H, S, T]. masked_rows: what the source gives for a row that is
    masked whole. readers: the source's nodes that read the mask, the last one where the operator will stand.
    """
    found = facts(view, mask, shape, readers)
    no_rows = "zeros" if masked_rows == "zeros" else "none"
    rounding = _rounding(found)
    if found.all_true:
        return ProvenMask(None, False, no_rows, ("mask proven all true",))
    if found.is_causal and same_size(shape[2], shape[3]):
        return ProvenMask(None, True, no_rows, ("causal mask proven",), rounding)
    words = (f"{found.structure} proven",) if found.structure else ("mask kept",)
    if found.empty_rows is False or (found.finite and masked_rows == "nan"):
        masked_rows = no_rows
    if found.allowed is None or (found.empty_rows is not False and found.fills != {-math.inf}):
        return ProvenMask(mask, False, masked_rows, words)
    return ProvenMask(found.allowed, False, masked_rows, (*words, "bool mask instead of a float one"), rounding)


def _rounding(found: MaskFacts) -> str:
    """What numerics="exact" has against reading a constant as "not attended"; nothing if no dtype has a lower one."""
    largest = max(found.fills, default=-math.inf)
    return "" if largest <= torch.finfo(torch.float16).min else f"keys that are masked by {largest:g} are left out"


def _allowed(
    reader: MaskReader, mask: object, value: Value, shape: Sequence[Size], axes: Sequence[Linear], time: int
) -> Node | None:
    """The condition of where(condition, 0, c), if it still is what it was."""
    call = reader.view.call(mask, "where")
    condition = call["condition"] if call is not None else None
    tensor = reader.view.tensor(condition)
    if not isinstance(condition, Node) or not isinstance(mask, Node) or tensor is None:
        return None
    own = aligned(tuple(tensor.shape), shape, tuple(axes))
    if tensor.dtype != torch.bool or not 2 <= tensor.dim() <= 4 or own is None:
        return None
    if written_since(reader.view, condition, mask):
        return None
    return condition if reader.value(condition, own, time) == _attended(value, otherwise=True) else None


def _is_plain(value: Value) -> bool:
    """Whether a float mask is 0 where keys are attended to, and vanishing elsewhere."""
    return all(isinstance(leaf, Number) and (leaf.value == 0 or leaf.value <= VANISHING) for leaf, _ in leaves(value))
