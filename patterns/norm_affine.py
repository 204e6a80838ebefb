"""What follows the normalised value of an RMSNorm or a LayerNorm: casts, the multiply by the weight, the add of a bias.

A norm is read in two halves. Inwards from its anchor, where the families differ; outwards here. The order in which the
author casts and multiplies is part of the meaning and becomes the operator's `cast_before_weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_moments import plus_number
from infuse.patterns.sites import Make, Refusal, Site
from infuse.patterns.sizes import same_size

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Norm:
    """What has been read so far.

    root: the last node read. x: the operator's input. x_dtype: its dtype; wider than x's own where the operator gets a
    wider copy. n_dtype: the dtype in which the normalised value is multiplied. cast: whether the value was rounded to
    x_dtype before the weight. closed: nothing more may be absorbed. rounding: as in `Site`. eps_as_minimum: of an
    RMSNorm, whether eps bounds the mean of squares.
    """

    kind: str
    root: Node
    x: Node
    x_dtype: torch.dtype | None
    eps: float | Node | Make
    n_dtype: torch.dtype
    trail: tuple[Node, ...]
    words: tuple[str, ...]
    weight: object = None
    bias: object = None
    offset: float = 0.0
    cast: bool = False
    closed: bool = False
    rounding: str = ""
    eps_as_minimum: bool = False

    @property
    def may_have_bias(self) -> bool:
        return self.kind == "layer_norm"

    @property
    def has_affine(self) -> bool:
        return self.weight is not None or self.bias is not None


def finish(view: CanonicalGraph, start: Norm) -> Site:
    """The site that starts with a normalised value."""
    # With the leading cast absorbed the result has to come back to x's dtype; if not, the cast one is the input.
    for norm in _inputs(view, start):
        end = _outwards(view, norm)
        if _is_whole(view, end):
            return _site(view, end)
    return _site(view, start)


def narrow_statistics(view: CanonicalGraph, kind: str, anchor: Node, nodes: Sequence[Node]) -> Refusal | None:
    """A refusal unless the anchor and the nodes around it are all in float32 or all in float64."""
    dtypes = {view.dtype(node) for node in (*nodes, anchor)}
    if dtypes in ({torch.float32}, {torch.float64}):
        return None
    names = ", ".join(sorted(short(dtype) for dtype in dtypes))
    return Refusal(
        kind,
        anchor,
        f"the statistics are not computed in float32 throughout: got {names}",
        "compute them in float32, from x.float()",
    )


def weighted(view: CanonicalGraph, norm: Norm, weight: Node) -> Norm:
    """The norm of an author who multiplies x by the weight first."""
    source, offset, trail = without_offset(view, weight, norm.n_dtype)
    words = (*norm.words, f"w = {offset:g} + weight first" if offset else "w first")
    return replace(norm, weight=source, offset=offset, words=words, trail=(*norm.trail, *trail))


def _inputs(view: CanonicalGraph, norm: Norm) -> list[Norm]:
    """The norm on the narrow x behind the leading cast, if there is one, and on x as it stands."""
    trail: list[Node] = []
    base = view.narrowed(norm.x, trail)
    if view.dtype(base) in HALF and norm.x_dtype == torch.float32:
        words = (f"x cast from {short(view.dtype(base))}", *norm.words)
        narrow = replace(norm, x=base, x_dtype=view.dtype(base), trail=(*trail, *norm.trail), words=words)
        return [narrow, norm]
    return [norm]


def _outwards(view: CanonicalGraph, norm: Norm) -> Norm:
    """The norm with what follows it absorbed, as far as it can be expressed."""
    while not norm.closed:
        skipped: list[Node] = []
        found = view.only_reader(norm.root, skipped)
        if found is None:
            return norm
        value, reader = found
        step = (
            _absorb_cast(view, norm, reader)
            or _absorb_weight(view, norm, value, reader)
            or _absorb_bias(view, norm, value, reader)
        )
        if step is None:
            return norm
        norm = replace(step, root=reader, trail=(*step.trail, *skipped, reader))
    return norm


def _absorb_cast(view: CanonicalGraph, norm: Norm, reader: Node) -> Norm | None:
    """A cast back to the dtype of a narrow x."""
    if view.call(reader, "cast") is None or norm.cast:
        return None
    if view.dtype(reader) != norm.x_dtype or norm.x_dtype == norm.n_dtype:
        return None
    if not norm.has_affine:
        return replace(norm, cast=True, words=(*norm.words, "cast"))
    return replace(norm, closed=True, words=(*norm.words, "cast last"))


def _absorb_weight(view: CanonicalGraph, norm: Norm, value: Node, reader: Node) -> Norm | None:
    """A multiply by a vector as long as the last dimension."""
    found = _vector(view, "mul", value, reader)
    if found is None or norm.has_affine:
        return None
    weight, vector, is_right = found
    order = "y * w" if is_right else "w * y"
    if norm.cast or not fits(view.dtype(weight), norm.n_dtype):
        # Multiplied after the rounding, or by something wider than the statistics: the operator's other order.
        if norm.cast or norm.x_dtype == norm.n_dtype:
            closed = not norm.may_have_bias
            return replace(norm, weight=vector, cast=True, closed=closed, words=(*norm.words, order))
        return None
    if vector is not weight:
        return replace(norm, weight=vector, words=(*norm.words, order))
    source, offset, trail = without_offset(view, weight, norm.n_dtype)
    words = (*norm.words, f"{order} with w = {offset:g} + weight" if offset else order)
    return replace(norm, weight=source, offset=offset, words=words, trail=(*norm.trail, *trail))


def _absorb_bias(view: CanonicalGraph, norm: Norm, value: Node, reader: Node) -> Norm | None:
    """An add of a vector as long as the last dimension."""
    found = _vector(view, "add", value, reader)
    if found is None or norm.bias is not None or not norm.may_have_bias:
        return None
    bias, vector, is_right = found
    order = "+ b" if is_right else "b +"
    if norm.cast or not fits(view.dtype(bias), norm.n_dtype):
        if norm.cast or norm.x_dtype == norm.n_dtype:
            return replace(norm, bias=vector, cast=True, closed=True, words=(*norm.words, order))
        return None
    trail: list[Node] = []
    plain = view.narrowed(bias, trail) if vector is bias else vector
    return replace(norm, bias=plain, words=(*norm.words, order), trail=(*norm.trail, *trail))


def _vector(view: CanonicalGraph, name: str, value: Node, reader: Node) -> tuple[Node, object, bool] | None:
    """(vector as it is read, as the operator gets it, whether it stands on the right) in a product or sum."""
    operands = view.operands(reader, name)
    if operands is None or operands[0] is operands[1]:
        return None
    vector = operands[1] if operands[0] is value else operands[0]
    argument = as_vector(view, vector, view.shape(value))
    dtype = view.dtype(vector)
    if not isinstance(vector, Node) or argument is None or dtype is None or not dtype.is_floating_point:
        return None
    if torch.promote_types(dtype, view.dtype(value) or dtype) != view.dtype(reader):
        return None
    return vector, argument, operands[0] is value


def as_vector(view: CanonicalGraph, vector: object, shape: tuple[Any, ...]) -> object | None:
    """A weight or bias as [D]: itself, or a reshape of [1, ..., D]; None if it is something else."""
    own = view.shape(vector)
    if not own or len(own) > len(shape) or not same_size(own[-1], shape[-1]):
        return None
    if len(own) == 1:
        return vector
    return Make(torch.reshape, (vector, (-1,))) if all(same_size(size, 1) for size in own[:-1]) else None


def without_offset(view: CanonicalGraph, weight: Node, n_dtype: torch.dtype) -> tuple[Node, float, tuple[Node, ...]]:
    """(w, c, nodes read) for a weight c + w that is added in the dtype of the statistics; (weight, 0, ()) otherwise."""
    trail: list[Node] = []
    plain = view.strip(weight, trail=trail)
    found = plus_number(view, plain)
    if found is not None and isinstance(found[1], float) and view.dtype(plain) == n_dtype:
        trail.append(plain)
        return view.strip(found[0], widening=True, trail=trail), found[1], tuple(trail)
    wide: list[Node] = []
    narrow = view.strip(weight, widening=True, trail=wide)
    return (narrow, 0.0, tuple(wide)) if view.dtype(weight) == n_dtype else (weight, 0.0, ())


def fits(dtype: torch.dtype | None, wide: torch.dtype) -> bool:
    """Whether a dtype widens to another without loss."""
    return dtype is not None and torch.promote_types(dtype, wide) == wide


def _is_whole(view: CanonicalGraph, norm: Norm) -> bool:
    """Whether what was absorbed has the operator's result dtype."""
    expected, out = norm.x_dtype, view.dtype(norm.root)
    if expected is None or out is None:
        return False
    for vector in (norm.weight, norm.bias) if norm.cast else ():
        dtype = view.dtype(vector.args[0] if isinstance(vector, Make) else vector)
        expected = expected if dtype is None else torch.promote_types(expected, dtype)
    return expected == out


def _site(view: CanonicalGraph, norm: Norm) -> Site:
    """The finished norm, with the arguments of its operator."""
    widened = norm.x_dtype != view.dtype(norm.x)
    x = Make(torch.ops.aten.to.dtype, (norm.x, norm.x_dtype)) if widened else norm.x
    vectors = (norm.weight, norm.bias) if norm.may_have_bias else (norm.weight,)
    floor = () if norm.may_have_bias else (norm.eps_as_minimum,)
    args = (x, *vectors, norm.eps, norm.offset, norm.cast and norm.has_affine, *floor)
    interior = tuple(dict.fromkeys(norm.trail))
    return Site(norm.kind, (norm.root,), norm.root, args, interior, ", ".join(norm.words), norm.rounding)


def short(dtype: torch.dtype | None) -> str:
    """A dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
