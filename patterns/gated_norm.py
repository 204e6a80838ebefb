"""RMSNorm and its gate become one operator: rms(x) * w * act(gate), or rms(x * act(gate)) * w.

A second stage: it looks at RMSNorm sites and at the products beside them. A product in front of a norm whose factors
both come straight out of projections is a gated MLP with a norm of its own, and stays that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from infuse.patterns import norm_affine
from infuse.patterns.activations import Activation, read_activation
from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.compose import Rule
from infuse.patterns.metadata import MissingMetadata
from infuse.patterns.norm_affine import HALF, Norm
from infuse.patterns.projections import origin, projection
from infuse.patterns.sites import Site
from infuse.patterns.sizes import same_shape, same_size

KIND = "gated_rms_norm"
_ACTIVATIONS = ("silu", "sigmoid")


@dataclass(frozen=True, slots=True)
class _Gated:
    """A product of a value and an activation. gate: the activation's argument, as narrow as it comes."""

    product: Node
    value: Node
    gate: Node
    activation: str
    trail: tuple[Node, ...]
    rounding: str


def propose(view: CanonicalGraph, sites: Sequence[Site]) -> Iterator[Site]:
    """A gated norm in place of each RMSNorm that has a gate."""
    products = {site.outputs[0]: site for site in sites if site.kind == "swiglu"}
    for site in sites:
        if site.kind == "rms_norm" and site.args[3] == 0 and not site.args[5]:
            with contextlib.suppress(MissingMetadata):
                joint = _gate_behind(view, site, products) or _gate_before(view, site, products)
                if joint is not None:
                    yield joint


def _gated(view: CanonicalGraph, product: object) -> Iterator[_Gated]:
    """The ways to read a product as value * act(gate)."""
    operands = view.operands(product, "mul")
    if operands is None or not isinstance(product, Node):
        return
    for side, value in (operands, operands[::-1]):
        act = read_activation(view, side)
        if act is None or act.name not in _ACTIVATIONS or not isinstance(value, Node):
            continue
        if not same_shape(view.shape(value), view.shape(act.gate)) or view.same_value(value, act.gate, []):
            continue
        casts: list[Node] = []
        gate = view.narrowed(act.gate, casts)
        yield _Gated(product, value, gate, act.name, (*casts, *act.trail, product), _rounding(view, act))


def _rounding(view: CanonicalGraph, act: Activation) -> str:
    """Where the activation is rounded; the operator computes it in the dtype of the statistics and does not."""
    if act.rounding or act.narrowed or view.dtype(act.value) in HALF or view.dtype(act.gate) in HALF:
        return act.rounding or f"{act.name} is rounded before it is multiplied"
    return ""


def _gate_behind(view: CanonicalGraph, norm: Site, products: Mapping[Node, Site]) -> Site | None:
    """rms(x) * w * act(gate)"""
    trail: list[Node] = []
    value = norm.outputs[0]
    found = view.only_reader(value, trail)
    while found is not None and view.call(found[1], "cast") is not None and view.widens(found[1]):
        trail.append(found[1])
        found = view.only_reader(found[1], trail)
    if found is None:
        return None
    gated = next((item for item in _gated(view, found[1]) if item.value is found[0]), None)
    if gated is None or not same_shape(view.shape(gated.product), view.shape(value)):
        return None
    x, weight, eps, _, cast_before_weight, _ = norm.args
    root, narrow, casts = _last_cast(view, gated.product, x)
    if narrow is None or (cast_before_weight and narrow is not x):
        return None
    cast_before_gate = view.dtype(value) in HALF
    return Site(
        KIND,
        (root,),
        root,
        (narrow, gated.gate, weight, eps, True, gated.activation, 1, cast_before_weight, cast_before_gate),
        tuple(dict.fromkeys((*norm.interior, *trail, *gated.trail, *casts))),
        f"{norm.spelling}, then {gated.activation} gate",
        norm.rounding or gated.rounding,
        _parts(norm, products.get(gated.product)),
    )


def _last_cast(view: CanonicalGraph, product: Node, x: object) -> tuple[Node, object | None, tuple[Node, ...]]:
    """(last node, x in its dtype, nodes read): the gated value, brought back to the dtype of a narrow x."""
    dtype = view.dtype(product)
    skipped: list[Node] = []
    found = view.only_reader(product, skipped)
    if found is not None and view.call(found[1], "cast") is not None and isinstance(x, Node):
        casts: list[Node] = []
        narrow = view.narrowed(x, casts)
        if view.dtype(narrow) == view.dtype(found[1]):
            return found[1], narrow, (*casts, *skipped, found[1])
    return product, (x if isinstance(x, Node) and view.dtype(x) == dtype else None), ()


def _gate_before(view: CanonicalGraph, norm: Site, products: Mapping[Node, Site]) -> Site | None:
    """rms(x * act(gate)) * w"""
    if not isinstance(norm.args[0], Node):
        return None
    trail: list[Node] = []
    node, groups = _ungrouped(view, norm.args[0], trail)
    gated = next(_gated(view, node), None)
    if gated is None or groups is None or _is_mlp(view, gated):
        return None
    own = {*norm.interior, *trail}
    if any(reader not in own for inner in (*trail, gated.product) for reader in view.readers(inner)):
        return None  # The product is needed elsewhere; fusing would compute it twice.
    site = _outwards(view, norm, gated, groups)
    if site is None:
        return None
    x, weight, eps, _, cast_before_weight, _ = site.args
    rounding = gated.rounding
    if view.dtype(gated.product) in HALF:
        rounding = rounding or "the gated value is rounded before it is normalised"
    return Site(
        KIND,
        site.outputs,
        site.before,
        (x, gated.gate, weight, eps, False, gated.activation, groups, cast_before_weight, False),
        tuple(dict.fromkeys((*gated.trail, *trail, *norm.interior, *site.interior))),
        f"{gated.activation} gate, then {norm.spelling}",
        norm.rounding or rounding,
        _parts(norm, products.get(gated.product)),
    )


def _ungrouped(view: CanonicalGraph, node: Node, trail: list[Node]) -> tuple[Node, int | None]:
    """(the product, into how many groups its last dimension is split); None where a view does something else."""
    node = view.strip(node, widening=True, trail=trail)
    call = view.call(node, "reshape")
    if call is None:
        return node, 1
    inner, shape = view.shape(call["input"]), view.shape(node)
    is_split = len(shape) == len(inner) + 1 and same_shape(shape[:-2], inner[:-1]) and type(shape[-2]) is int
    trail.append(node)
    groups = shape[-2] if is_split else None
    if isinstance(groups, int) and not same_size(groups * shape[-1], inner[-1]):
        groups = None
    return view.strip(call["input"], widening=True, trail=trail), groups if isinstance(groups, int) else None


def _is_mlp(view: CanonicalGraph, gated: _Gated) -> bool:
    return _is_projected(view, gated.value) and _is_projected(view, gated.gate)


def _is_projected(view: CanonicalGraph, node: Node) -> bool:
    """Whether a value comes straight out of a product with a weight, or is the sum of two such (LoRA)."""
    source = origin(view, node)[0]
    if projection(view, source):
        return True
    terms = view.operands(source, "add") or ()
    sources = [origin(view, term)[0] for term in terms if isinstance(term, Node)]
    return len(sources) == 2 and all(projection(view, item) for item in sources)


def _outwards(view: CanonicalGraph, norm: Site, gated: _Gated, groups: int) -> Site | None:
    """The norm of the gated value with what follows it, back in the shape of x and, if it can be, in x's dtype."""
    root, weight = norm.outputs[0], norm.args[1]
    trail: list[Node] = []
    if not same_shape(view.shape(root), view.shape(gated.product)):
        found = view.only_reader(root, trail)
        if found is None or weight is not None or view.call(found[1], "reshape") is None:
            return None
        root = found[1]
        trail.append(root)
        if not same_shape(view.shape(root), view.shape(gated.product)):
            return None
    dtype, out = view.dtype(gated.product), view.dtype(root)
    if dtype is None or out is None or (norm.args[4] and dtype not in HALF):
        return None
    start = Norm(
        "rms_norm",
        root,
        gated.value,
        dtype,
        norm.args[2],  # type: ignore[arg-type]
        torch.float64 if dtype == torch.float64 else torch.float32,
        tuple(trail),
        (),
        weight=weight,
        cast=bool(norm.args[4]) or (dtype in HALF and weight is None),
        closed=weight is not None and (bool(norm.args[4]) or dtype in HALF),
    )
    return norm_affine.finish(view, start)


def _parts(norm: Site, product: Site | None) -> tuple[Site, ...]:
    return (norm,) if product is None else (norm, product)


RULES = (Rule(KIND, ("rms_norm", "swiglu"), propose),)
