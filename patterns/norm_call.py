"""Calls of torch's rms_norm and layer_norm by name."""

from __future__ import annotations

import torch
from torch.fx import Node

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.norm_affine import HALF, Norm, fits, short, without_offset
from infuse.patterns.sites import Refusal

# What F.layer_norm takes without an eps; torch.rms_norm takes the eps of the dtype it computes in.
_LAYER_NORM_EPS = 1e-5


def from_call(view: CanonicalGraph, anchor: Node, kind: str) -> Norm | Refusal | None:
    """The norm that a call of `kind` computes, or why it is not the operator's."""
    call = view.call(anchor, kind)
    if call is None:
        return None
    x, shape = call["input"], call["normalized_shape"]
    dtype, out = view.dtype(x), view.dtype(anchor)
    # Autocast widens x and what is beside it.
    x_dtype = out if dtype in HALF and out == torch.float32 else dtype
    if dtype is None or x_dtype is None or out != x_dtype:
        remedy = "cast x before the norm, outside autocast"
        return Refusal(kind, anchor, f"x is {short(dtype)} and the result {short(out)}", remedy)
    # With dynamic shapes it may be the node of a slice of x.shape.
    shape = view.value(shape) if isinstance(shape, Node) else shape
    dims = shape if isinstance(shape, (tuple, list)) else (shape,)
    if len(dims) != 1:
        reason = f"normalized_shape has {len(dims)} dimensions, expected 1"
        return Refusal(kind, anchor, reason, "flatten the normalised dimensions into one")
    n_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("weight", "bias"):
        if call[name] is not None and not fits(view.dtype(call[name]), n_dtype):
            reason = f"the {name} is {short(view.dtype(call[name]))} beside x {short(dtype)}"
            return Refusal(kind, anchor, reason, f"cast the {name}")
    eps = _eps(view, call["eps"], kind, n_dtype)
    if eps is None:
        return Refusal(kind, anchor, "eps is a tensor", "pass eps as a Python float")
    weight, offset, trail = call["weight"], 0.0, [anchor]
    if weight is not None:
        weight, offset, read = without_offset(view, weight, n_dtype)
        trail += read
    bias = None if call["bias"] is None else view.narrowed(call["bias"], trail)
    rounded, affine = x_dtype in HALF, weight is not None or bias is not None
    words = (kind, f"w = {offset:g} + weight") if offset else (kind,)
    return Norm(
        kind,
        anchor,
        x,
        x_dtype,
        eps,
        n_dtype,
        tuple(trail),
        words,
        weight=weight,
        bias=bias,
        offset=offset,
        cast=rounded and not affine,
        # A half-precision result is rounded after the affine part, which leaves nothing to absorb.
        closed=rounded and affine,
    )


def _eps(view: CanonicalGraph, given: object, kind: str, n_dtype: torch.dtype) -> float | Node | None:
    if given is None:
        return torch.finfo(n_dtype).eps if kind == "rms_norm" else _LAYER_NORM_EPS
    return view.number(given)
