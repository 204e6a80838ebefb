"""Gated units in a record: act(g) * h elementwise, where g comes out of a linear layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from census.attention import MATMULS
from census.trace import VIEWS, Key, Op, Value, names, origin, part

NONLINEAR = names(
    "silu gelu sigmoid relu tanh erf mish softplus hardswish hardsigmoid leaky_relu elu celu selu hardtanh "
    "log_sigmoid_forward relu6 threshold"
)
_LINEARS = MATMULS | names("_grouped_mm _scaled_mm _weight_int8pack_mm _weight_int4pack_mm convolution")
# An activation may be written out of these.
_POINTWISE = NONLINEAR | VIEWS | names("mul add sub rsub div pow neg clamp clamp_min clamp_max reciprocal exp")
# Between a linear layer and its activation: bias, LoRA's update, scales, clamps.
_AFTER_LINEAR = names("mul div clamp clamp_min clamp_max neg")


_RANDOM = frozenset(("bernoulli", "rand", "rand_like", "uniform"))  # a dropout's mask
_MOST = 40  # values looked at from one product


def sites(ops: list[Op], strict: bool = True) -> Iterator[Op]:
    """Products act(g) * h. strict: g comes from a linear layer; else from anywhere."""
    for op in ops:
        if op.name == "glu":
            if not strict or _is_linear(op.inputs[0]):
                yield op
        elif op.name == "mul" and len(op.inputs) == 2:
            left, right = op.inputs
            if left.shape == right.shape and left.shape and left.dtype.is_floating_point:
                gates = [key for key in (_gate_of(left, right), _gate_of(right, left)) if key is not None]
                if any(not strict or _is_linear(key[0]) for key in gates):
                    yield op


def _gate_of(activated: Value, other: Value) -> Key | None:
    """g, if one factor is an activation of g and the other is neither g, nor a function of g alone, nor a weight.

    A product with a function of g alone is an activation itself: x * sigmoid(x).
    """
    keys, nonlinear = _roots(activated)
    if not nonlinear or len(keys) != 1 or part(other)[0].is_parameter:
        return None
    (key,) = keys
    return None if _roots(other)[0] <= keys else key


def _roots(value: Value) -> tuple[set[Key], bool]:
    """The tensors that a value is a pointwise function of, and whether something on the way is an activation."""
    keys: set[Key] = set()
    names: set[str] = set()
    value_shape = value.shape
    todo, seen = [value], {value}
    while todo:
        key = part(todo.pop())
        base, steps = key
        maker = base.maker
        is_pointwise = maker is not None and maker.name in _POINTWISE and len(seen) < _MOST
        is_layer = maker is not None and maker.name in ("add", "sub") and _is_linear(base)
        if steps or maker is None or not is_pointwise or is_layer:
            is_smaller = math.prod(base.shape) < math.prod(value_shape)  # a mask or a scale that broadcasts
            if not base.is_parameter and not is_smaller and (maker is None or maker.name not in _RANDOM):
                keys.add(key)
            continue
        names.add(maker.name)
        for argument in maker.inputs:
            if argument not in seen:
                seen.add(argument)
                todo.append(argument)
    written_out = "exp" in names and bool(names & {"div", "reciprocal", "pow"})  # x / (1 + exp(-x))
    return keys, written_out or bool(names & NONLINEAR)


def _is_linear(value: Value) -> bool:
    """Whether a value comes out of a linear layer, through biases, LoRA's updates, scales and clamps but no more."""
    base = origin(value)
    maker = base.maker
    if maker is None or maker.name in _LINEARS:
        return maker is not None
    tensors = [argument for argument in maker.inputs if not origin(argument).is_parameter and argument.shape]
    if maker.name in ("add", "sub"):
        return bool(tensors) and all(_is_linear(argument) for argument in tensors)
    return maker.name in _AFTER_LINEAR and len(tensors) == 1 and _is_linear(tensors[0])
