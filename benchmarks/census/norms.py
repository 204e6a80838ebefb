"""RMSNorms and LayerNorms in a record: a row divided by the root of its mean square, or one fused call."""

from __future__ import annotations

from collections.abc import Iterator

from census.trace import VIEWS, Op, Value, first, names, origin

_ROOTS = names("sqrt rsqrt")
# What lies between a statistic and the product that applies it.
_STATISTIC = VIEWS | _ROOTS | names("add clamp clamp_min clamp_max maximum div mul reciprocal pow sub rsub")


def sites(ops: list[Op]) -> Iterator[tuple[str, Op]]:
    """(kind, operator that applies the statistic) of every norm over trailing dimensions."""
    found: set[Op] = set()
    for op in ops:
        if op.name == "native_layer_norm":
            yield "layer_norm", op
        elif op.name in ("_fused_rms_norm", "rms_norm"):
            yield "rms_norm", op
        elif op.name in ("mean", "sum", "var", "std", "var_mean", "std_mean") and _is_trailing(op):
            source = _source_of(op)
            if source is None:
                continue
            for applied, kind in _applied(op, source):
                if applied not in found:
                    found.add(applied)
                    yield kind, applied
                break


def l2_norms(ops: list[Op]) -> Iterator[Op]:
    """Divisions by a Euclidean length: no RMSNorm as such, though a scale may make one of it."""
    for op in ops:
        if op.name == "linalg_vector_norm" or (op.name == "sum" and _source_of(op) is not None):
            yield op


def _is_trailing(op: Op) -> bool:
    value = first(op)
    dims = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    if value is None or dims is None:
        return False
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    rank = len(value.shape)
    return bool(dims) and sorted(d % rank for d in dims) == list(range(rank - len(dims), rank))


def _source_of(statistic: Op) -> Value | None:
    """The value whose mean square or variance an operator takes."""
    value = first(statistic)
    if value is None or not value.dtype.is_floating_point:
        return None
    if statistic.name not in ("mean", "sum"):
        return value
    square = origin(value).maker
    if square is None:
        return None
    if square.name in ("pow", "square") and (square.name == "square" or square.args[1] == 2):
        return first(square)
    if square.name == "mul" and len(square.inputs) == 2 and origin(square.inputs[0]) is origin(square.inputs[1]):
        return square.inputs[0]
    return None


def _applied(statistic: Op, source: Value) -> Iterator[tuple[Op, str]]:
    """Products and quotients of the source with the root of its statistic."""
    divided = statistic.name != "sum"
    rooted = statistic.name.startswith("std")
    base = origin(source)
    todo = [(statistic.out, rooted, divided)]
    seen = {statistic.out}
    while todo:
        value, rooted, divided = todo.pop()
        for user in value.users:
            if user.name in ("mul", "div") and rooted and divided:
                others = [other for other in user.inputs if other is not value]
                kind = _kind(statistic, others[0], base) if others else ""
                if kind:
                    yield user, kind
                    continue
            if user.name in _STATISTIC and user.outputs and user.out not in seen:
                now_rooted = rooted or user.name in _ROOTS or (user.name == "pow" and user.args[1] in (-0.5, 0.5))
                now_divided = divided or (user.name in ("div", "mul") and not rooted)
                seen.add(user.out)
                todo.append((user.out, now_rooted, now_divided))


def _kind(statistic: Op, numerator: Value, base: Value) -> str:
    """ "layer_norm" if what is normalised is centred, "rms_norm" if it is the source itself, "" if it is neither."""
    averaged = first(statistic)
    if averaged is not None and averaged.shape[-1] != numerator.shape[-1]:
        return ""  # the statistic of a part
    for top in (origin(numerator), _unweighted(origin(numerator))):
        inside = _is_centred(top)
        if top is base:
            return (
                "layer_norm" if inside is not None else "" if statistic.name.startswith(("var", "std")) else "rms_norm"
            )
        if inside is not None and (inside is base or inside is _is_centred(base)):
            return "layer_norm"
    return ""


def _unweighted(value: Value) -> Value:
    """x of w * x, if that is what a value is: a weight may come before the division."""
    maker = value.maker
    if maker is not None and maker.name == "mul" and len(maker.inputs) == 2:
        plain = [factor for factor in maker.inputs if not origin(factor).is_parameter]
        return origin(plain[0]) if len(plain) == 1 else value
    return value


def _is_centred(value: Value) -> Value | None:
    """x of x - mean(x)."""
    maker = value.maker
    if maker is None or maker.name not in ("sub", "add") or len(maker.inputs) != 2:
        return None
    left, right = origin(maker.inputs[0]), origin(maker.inputs[1])
    mean = right.maker
    if mean is None or mean.name not in ("mean", "var_mean", "std_mean", "div", "mul"):
        return None
    if mean.name in ("div", "mul"):
        mean = origin(mean.inputs[0]).maker
        if mean is None or mean.name != "sum":
            return None
    averaged = first(mean)
    return left if averaged is not None and origin(averaged) is left else None
