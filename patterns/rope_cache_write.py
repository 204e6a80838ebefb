"""The rotations of q and k, the norms before them if there are any, and the writes of k and v into a static cache.

The operator stands where the later one of the two writes stood. So nothing between the two may read or write a cache,
k's rotation may be read by its write alone, and q's by what comes later; views of q that come earlier move along.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from infuse.patterns import qk_norm_rope
from infuse.patterns.cache_writes import CacheWrite, read_cache_write, touches_only_others
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.safety import storages
from infuse.patterns.sites import Make, Site, arguments_of
from infuse.patterns.sizes import same_shape

KIND = "rope_cache_write"
_RANK = 4
_MAX_VIEWS = 4
# Between the two writes lie the slicing of positions and views of v.
_MAX_BETWEEN = 32
Order = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation that may become part of the operator, as it stands: a site of its own or with its norm.

    output: the value that it makes. order: which of its dimensions are batch, heads, positions, elements. trail: the
    views behind it that move along.
    """

    site: Site
    output: Node
    order: Order
    trail: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a site computes: rope(rms_norm(x, weight, *norm), cos, sin, *flags); norm None: without one."""

    site: Site
    x: object
    cos: object
    sin: object
    weight: object
    norm: tuple[object, ...] | None
    flags: tuple[object, ...]


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """rope_cache_write for each pair of neighbouring writes of which one writes a rotated tensor."""
    made = {site.outputs[0]: site for site in sites if site.kind in ("rope", "qk_norm_rope") and not site.after}
    if not made:
        return
    norms = qk_norm_rope.norms_of(sites)
    joined = {output: qk_norm_rope.join(view, norms, site) for output, site in made.items() if site.kind == "rope"}
    writes = [write for node in view.nodes if (write := read_cache_write(view, node)) is not None]
    traced = [_behind_views(view, made, write) for write in writes]
    for (k_write, k), (v_write, v) in _neighbours([*zip(writes, traced)]):
        if k is None or v is not None:
            continue
        last = max(view.index[k_write.node], view.index[v_write.node])
        q = _rotation_of_q(view, made, k, last, {found.output for found in traced if found is not None})
        site = None if q is None else _build(view, joined, q, k, k_write, v_write)
        if site is not None:
            yield site


Traced = tuple[CacheWrite, "Rotation | None"]


def _neighbours(writes: Sequence[Traced]) -> Iterator[tuple[Traced, Traced]]:
    """Each write with the one behind it and with the one before it."""
    for first, second in itertools.pairwise(writes):
        yield first, second
        yield second, first


def _terms(site: Site | None) -> Terms | None:
    """None for a norm that the operator does not know."""
    if site is None:
        return None
    if site.kind == "rope":
        x, cos, sin, *flags = site.args
        return Terms(site, x, cos, sin, None, None, tuple(flags))
    x, cos, sin, weight, bias, eps, centered, offset, cast, eps_as_minimum, *flags = site.args
    if bias is not None or centered or eps_as_minimum:
        return None
    return Terms(site, x, cos, sin, weight, (eps, offset, cast), tuple(flags))


def _behind_views(view: CanonicalGraph, made: dict[Node, Site], write: CacheWrite) -> Rotation | None:
    """The rotation that a write writes, through views that nobody else reads."""
    node, trail, order = write.value, list[Node](), tuple(range(_RANK))
    reader = write.view or write.node
    if reader is not write.node and view.readers(reader) != [write.node]:
        return None
    for _ in range(_MAX_VIEWS):
        if view.readers(node) != [reader]:
            return None
        if node in made:
            return Rotation(made[node], node, order, tuple(trail))
        call = view.call(node, "alias", "permute")
        if call is None:
            return None
        if call.name == "permute":
            order = tuple(call["dims"][dim] for dim in order)
        trail.append(node)
        node, reader = call["input"], node
        if not isinstance(node, Node):
            return None
    return None


def _rotation_of_q(
    view: CanonicalGraph, made: dict[Node, Site], k: Rotation, last: int, written: set[Node]
) -> Rotation | None:
    """The rotation nearest to k's, before the writes, of as many positions; its views as far as they come early."""
    before = [node for node in made if node not in written and node is not k.output and view.index[node] < last]
    for node in sorted(before, key=lambda node: abs(view.index[node] - view.index[k.output])):
        if not _same_positions(view, node, k):
            continue
        trail: list[Node] = []
        while (readers := view.readers(node)) and min(view.index[reader] for reader in readers) <= last:
            call = view.call(readers[0], "alias", "permute")
            if len(readers) > 1 or call is None or len(trail) == _MAX_VIEWS:
                return None
            trail.append(readers[0])
            node = readers[0]
        origin = trail[0].all_input_nodes[0] if trail else node
        return Rotation(made[origin], origin, k.order, tuple(trail))
    return None


def _same_positions(view: CanonicalGraph, q: Node, k: Rotation) -> bool:
    """Whether two rotations have the same sizes but for the heads, and one dtype."""
    q_shape, k_shape = view.shape(q), view.shape(k.output)
    if len(q_shape) != _RANK or view.dtype(q) != view.dtype(k.output):
        return False
    alike = [dim for i, dim in enumerate(k.order) if i != 1]
    return same_shape([q_shape[dim] for dim in alike], [k_shape[dim] for dim in alike])


def _build(
    view: CanonicalGraph,
    joined: dict[Node, Site | None],
    q: Rotation,
    k: Rotation,
    k_write: CacheWrite,
    v_write: CacheWrite,
) -> Site | None:
    """The site, if both rotations are of one form and nobody can tell when the caches were written."""
    terms = _alike(joined, q, k)
    if terms is None or k.order[-1] != _RANK - 1:
        return None
    q_terms, k_terms = terms
    q_args, k_args = (_heads_first(view, found, k.order) for found in terms)
    if q_args is None or k_args is None:
        return None
    numbers = (None, 0.0, False) if q_terms.norm is None else q_terms.norm
    positions_and_weights = (k_write.positions, v_write.positions, q_terms.weight, k_terms.weight)
    read = (q_args[0], k_args[0], v_write.value, *q_args[1:], *k_args[1:], *positions_and_weights)
    if not _is_unobserved(view, read, k_write, v_write):
        return None
    q_site, k_site = q_terms.site, k_terms.site
    writes = [node for write in (k_write, v_write) for node in (write.view, write.node) if node is not None]
    nodes = (*q_site.interior, *q.trail, *k_site.interior, *k.trail, *writes)
    return Site(
        KIND,
        ((q.output, *q.trail)[-1],),
        max((k_write.node, v_write.node), key=view.index.__getitem__),
        (*read[:7], k_write.cache, v_write.cache, *read[7:], *numbers, *q_terms.flags),
        tuple(dict.fromkeys(nodes)),
        f"q: {q_site.spelling}; k: {k_site.spelling}; cache: {_spelling(k_write)}",
        "; ".join(dict.fromkeys(filter(None, (q_site.rounding, k_site.rounding)))),
        tuple(part for whole, own in ((q_site, q.site), (k_site, k.site)) for part in _parts(whole, own)),
        _back(view, q),
        tuple((write.node, write.cache) for write in (k_write, v_write)),
    )


def _alike(joined: dict[Node, Site | None], q: Rotation, k: Rotation) -> tuple[Terms, Terms] | None:
    """Both with their norms, or as they stand, if they differ in nothing but tensors."""
    for q_site, k_site in ((joined.get(q.output), joined.get(k.output)), (q.site, k.site)):
        q_terms, k_terms = _terms(q_site), _terms(k_site)
        if q_terms is None or k_terms is None:
            continue
        if (q_terms.norm, q_terms.flags) == (k_terms.norm, k_terms.flags):
            return q_terms, k_terms
    return None


def _parts(whole: Site, own: Site) -> tuple[Site, ...]:
    """The sites that are there: a site that was joined here is not."""
    return (own,) if whole is own else whole.parts


def _heads_first(view: CanonicalGraph, terms: Terms, order: Order) -> tuple[object, object, object] | None:
    """x, cos and sin with the dimensions batch, heads, positions, elements; None for tables that do not fit."""
    if order == tuple(range(_RANK)):
        return terms.x, terms.cos, terms.sin
    tables: list[object] = []
    for table in (terms.cos, terms.sin):
        rank = _rank(view, table)
        if rank is None or rank > _RANK:
            return None
        if rank < _RANK:
            table = Make(operator.getitem, (table, (*(None for _ in range(_RANK - rank)), Ellipsis)))
        tables.append(Make(torch.permute, (table, order)))
    return Make(torch.permute, (terms.x, order)), tables[0], tables[1]


def _rank(view: CanonicalGraph, value: object) -> int | None:
    """Of a node, or of the real or imaginary part of one; None for anything else."""
    parts = 0
    while isinstance(value, Make) and value.target in (torch.select, torch.view_as_real):
        parts += 1 if value.target is torch.view_as_real else -1
        value = value.args[0]
    return len(view.shape(value)) + parts if isinstance(value, Node) else None


def _back(view: CanonicalGraph, q: Rotation) -> tuple[tuple[Callable[..., object], tuple[object, ...]], ...]:
    """From the operator's result to q's last view."""
    dims = tuple(q.order.index(dim) for dim in range(_RANK))
    for node in q.trail:
        call = view.call(node, "permute")
        dims = dims if call is None else tuple(dims[dim] for dim in call["dims"])
    return () if dims == tuple(range(_RANK)) else ((torch.permute, (dims,)),)


def _is_unobserved(view: CanonicalGraph, read: tuple[object, ...], k_write: CacheWrite, v_write: CacheWrite) -> bool:
    """Whether the caches are memory of their own that nothing between the two writes reads or writes."""
    caches = [storages(view.value(write.cache)) for write in (k_write, v_write)]
    both = caches[0] | caches[1]
    if -1 in both or len(both) != 2 or any(len(found) != 1 for found in caches):
        return False
    if any(storages(view.value(node)) & both for node in arguments_of(read)):
        return False
    first, last = sorted(view.index[write.node] for write in (k_write, v_write))
    between = view.nodes[first + 1 : last]
    return len(between) <= _MAX_BETWEEN and touches_only_others(view, between, both)


def _spelling(write: CacheWrite) -> str:
    return "index_copy_" if "index_copy" in str(write.node.target) else "indexed assignment"


RULE = Rule(KIND, ("rope", *qk_norm_rope.NORMS), propose)
