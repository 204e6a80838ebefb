"""q, k and v of an attention: from which node each is best taken, and how their axes make up the operator's dimensions.

The operator takes q [B, H, S, D], k [B, H_kv, T, D] and v [B, H_kv, T, Dv], where q head h reads K/V head
h // (H / H_kv). Behind a node lie views, copies that repeat K/V heads, casts that lose nothing and multiplications by a
number; the node is chosen that needs the fewest views of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from infuse.patterns.axes import Axes, Dims, flat, leaves, regroup, resolved, unpermuted
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.relayout import Relayout, Step
from infuse.patterns.scales import scaled, times
from infuse.patterns.sizes import same_size

# How many nodes behind an operand are looked at.
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor and its axes. scale: what it is to be multiplied by. trail: the nodes that were looked through.

    rounded: those of them that may round. folded: whether repeated heads were left away.
    """

    node: Node
    dims: Dims
    scale: object = 1.0
    trail: tuple[Node, ...] = ()
    rounded: tuple[Node, ...] = ()
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """Which axes make up the operator's dimensions; H is kv_heads then groups."""

    batch: Axes
    kv_heads: Axes
    groups: Axes
    queries: Axes
    keys: Axes
    inner: Axes
    values: Axes

    @property
    def heads(self) -> Axes:
        return (*self.kv_heads, *self.groups)

    @property
    def q(self) -> Dims:
        return self.batch, self.heads, self.queries, self.inner

    @property
    def k(self) -> Dims:
        return self.batch, self.kv_heads, self.keys, self.inner

    @property
    def v(self) -> Dims:
        return self.batch, self.kv_heads, self.keys, self.values

    @property
    def scores(self) -> Dims:
        return self.batch, self.heads, self.queries, self.keys

    @property
    def out(self) -> Dims:
        return self.batch, self.heads, self.queries, self.values


@dataclass(frozen=True, slots=True)
class Roles:
    """The axes that are no batch: of the queries, the keys, and the inner dimensions of q k^T and of v."""

    queries: Axes
    keys: Axes
    inner: Axes
    values: Axes

    def whole(self) -> tuple[Axes, ...]:
        return tuple(leaves(axes) for axes in (self.queries, self.keys, self.inner, self.values))


def behind(view: CanonicalGraph, operand: Operand, roles: Roles, may_scale: bool) -> list[Operand]:
    """The operand, and what lies behind it, outermost first: the same tensor but for `scale` and `folded`."""
    found = [operand]
    while len(found) <= _MAX_DEPTH:
        deeper = _deeper(view, found[-1], roles, may_scale)
        if deeper is None:
            break
        found.append(deeper)
    return found


def _deeper(view: CanonicalGraph, operand: Operand, roles: Roles, may_scale: bool) -> Operand | None:
    node = operand.node
    trail = (*operand.trail, node)
    call = view.call(node, "alias", "cast", "permute", "reshape", "expand", "repeat", "repeat_interleave")
    if call is None:
        found = scaled(view, node) if may_scale else None
        if found is None or view.dtype(found[0]) != view.dtype(node):
            return None
        scale, rounded = times(operand.scale, found[1]), (*operand.rounded, node)
        return replace(operand, node=found[0], scale=scale, trail=trail, rounded=rounded)
    if call.name == "cast" and not view.widens(node):
        return None
    dims: Dims | None = operand.dims
    if call.name == "permute":
        dims = unpermuted(operand.dims, call["dims"])
    elif call.name == "reshape":
        dims = regroup(operand.dims, view.shape(call["input"]), flat(roles.whole()))
    elif call.name not in ("alias", "cast"):
        dims = _before_repeating(view, operand, call.name, call["input"], call["dim"], call["repeats"])
        operand = replace(operand, folded=True)
    if dims is None or not _is_clean(dims, roles):
        return None
    return replace(operand, node=call["input"], dims=dims, trail=trail)


def _is_clean(dims: Dims, roles: Roles) -> bool:
    """Whether no dimension mixes batch axes with others."""
    whole = roles.whole()
    others = set(flat(whole))
    return all(axes in whole or not others & set(axes) for axes in resolved(dims))


def _before_repeating(
    view: CanonicalGraph, operand: Operand, name: str, source: Node, dim: object, repeats: object
) -> Dims | None:
    """The dimensions of what `expand`, `repeat` or `repeat_interleave` repeated: its axes less those repeated along."""
    before, after = view.shape(source), view.shape(operand.node)
    if name == "repeat_interleave":
        return _before_interleaving(operand.dims, before, dim, repeats)
    rank = len(after) - len(before)
    dims: list[Axes] = []
    for old, new, axes in zip(before, after[rank:], operand.dims[rank:]):
        if not same_size(old, new) and not same_size(old, 1):
            return None  # Repeated as a block.
        dims.append(axes if same_size(old, new) else ())
    return tuple(dims)


def _before_interleaving(dims: Dims, before: Sequence[object], dim: object, repeats: object) -> Dims | None:
    if not isinstance(dim, tuple) or len(dim) != 1 or type(repeats) is not int:
        return None
    narrow = before[dim[0]]
    axes = dims[dim[0]]
    inner = regroup((axes,), (narrow, repeats))  # type: ignore[arg-type]
    return None if inner is None else tuple(inner[0] if i == dim[0] else own for i, own in enumerate(dims))


def frame_of(scores: Dims, roles: Roles, q: Dims, k: Dims, v: Dims) -> Frame:
    """The frame for operands with these dimensions.

    Batch axes that neither k nor v has are groups of q heads; of the others the last dimension of q's is the heads.
    """
    known = set(flat(roles.whole()))
    order = [axis for axis in flat(scores) if axis not in known]
    shared_axes = {*flat(k), *flat(v)}
    groups = tuple(axis for axis in order if axis not in shared_axes)
    shared = tuple(axis for axis in order if axis in shared_axes)
    letters = [tuple(axis for axis in axes if axis in shared) for axes in resolved(q)]
    letters = [axes for axes in letters if axes]
    if len(letters) > 1 and tuple(axis for axes in letters for axis in axes) == shared:
        heads = len(letters[-1])
    else:
        with_groups = any({*axes} & {*shared} and {*axes} & {*groups} for axes in resolved(q))
        heads = 1 if len(shared) > 1 or with_groups else 0
    split = len(shared) - heads
    parts = (leaves(axes) for axes in (roles.queries, roles.keys, roles.inner, roles.values))
    return Frame(shared[:split], shared[split:], groups, *parts)


def is_ordered(frame: Frame, scores: Dims) -> bool:
    """Whether batch, heads and groups follow each other as in the scores, so that q needs no copy."""
    known = {*frame.queries, *frame.keys}
    order = tuple(axis for axis in flat(scores) if axis not in known)
    return order == (*frame.batch, *frame.heads)


@dataclass(frozen=True, slots=True)
class Settled:
    """The operands as they are taken, with the views they need."""

    frame: Frame
    q: Operand
    k: Operand
    v: Operand
    steps: tuple[list[Step], list[Step], list[Step]]
    relayout: Relayout


def settle(
    view: CanonicalGraph,
    operands: tuple[Operand, Operand, Operand],
    scores: Dims,
    roles: Roles,
    dtype: torch.dtype | None,
    may_scale: bool,
) -> Settled | None:
    """q, k and v as the operator takes them, in `dtype` where one of their forms has it; None if axes do not fit."""
    chains = [
        _in_dtype(view, behind(view, operand, roles, may_scale and i < 2), dtype) for i, operand in enumerate(operands)
    ]
    plain = [[state for state in chain if not state.folded] or chain for chain in chains]
    if any(state.folded for chain in chains[1:] for state in chain):
        folded = [plain[0], *([state for state in chain if state.folded] or chain for chain in chains[1:])]
        found = _settle(view, folded, scores, roles)
        if found is not None and is_ordered(found.frame, scores) and _alike(found.k.dims, found.v.dims, roles):
            return found
    return _settle(view, plain, scores, roles)


def _in_dtype(view: CanonicalGraph, chain: list[Operand], dtype: torch.dtype | None) -> list[Operand]:
    """Those of the chain that have the dtype; if none has, those that have the outermost one's."""
    found = [state for state in chain if view.dtype(state.node) == dtype]
    own = view.dtype(chain[0].node)
    return found or [state for state in chain if view.dtype(state.node) == own]


def _alike(k: Dims, v: Dims, roles: Roles) -> bool:
    """Whether k and v have the same batch axes."""
    known = set(flat(roles.whole()))
    return set(flat(k)) - known == set(flat(v)) - known


def _settle(view: CanonicalGraph, chains: list[list[Operand]], scores: Dims, roles: Roles) -> Settled | None:
    q, k, v = (chain[-1] for chain in chains)
    frame = frame_of(scores, roles, q.dims, k.dims, v.dims)
    relayout = Relayout(view, [state.node for chain in chains for state in reversed(chain)])
    chosen: list[Operand] = []
    steps: list[list[Step]] = []
    for chain, target in zip(chains, (frame.q, frame.k, frame.v)):
        plans = [(state, relayout.plan(state.dims, target, (True, True, False, False))) for state in chain]
        possible = [(len(plan), -depth, state, plan) for depth, (state, plan) in enumerate(plans) if plan is not None]
        if not possible:
            return None
        _, _, state, plan = min(possible, key=lambda item: item[:2])
        chosen.append(state)
        steps.append(plan)
    return Settled(frame, chosen[0], chosen[1], chosen[2], (steps[0], steps[1], steps[2]), relayout)
