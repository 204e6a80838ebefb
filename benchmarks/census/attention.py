"""Attentions in a record: a softmax of scores whose probabilities are multiplied with values, or one fused call."""

from __future__ import annotations

from collections.abc import Iterator

from census.trace import VIEWS, Op, Value, first, names, origin

MATMULS = names("mm bmm baddbmm addmm mv addmv dot addbmm matmul linear")
# Fused calls and how many sites of which kind each of them is.
FUSED = {
    "_native_multi_head_attention": {"attention": 1},
    "_transformer_encoder_layer_fwd": {"attention": 1, "layer_norm": 2},
}
_SCORES = VIEWS | names(
    "mul div add sub rsub where masked_fill tanh clamp clamp_min clamp_max neg minimum maximum cat stack log exp "
    "masked_scatter index_put copy nan_to_num index gather scatter addcmul sigmoid pow"
)
_PROBABILITIES = VIEWS | names("mul where masked_fill nan_to_num native_dropout copy")


def operands(matmul: Op) -> tuple[Value, Value]:
    """The two factors of a product."""
    tensors = [arg for arg in matmul.args if isinstance(arg, Value)]
    if matmul.name in ("addmm", "baddbmm", "addmv", "addbmm"):
        return tensors[1], tensors[2]
    return tensors[0], tensors[1]


def calls(ops: list[Op]) -> Iterator[Op]:
    """Fused attention calls."""
    for op in ops:
        if op.name.startswith("_scaled_dot_product_") or op.name in FUSED:
            yield op


def open_coded(ops: list[Op], strict: bool = True) -> Iterator[Op]:
    """Softmaxes that belong to an attention.

    strict: not those whose keys are weights while their values are not (a router, linear attention), or the other way
    about (heads that are mixed).
    """
    for op in ops:
        softmax_input = _softmax_input(op)
        if softmax_input is None:
            continue
        products = list(_products_with(op.out))
        scores = list(_score_matmuls(softmax_input))
        if not products or not scores:
            continue
        if not strict or _is_attention(scores, products):
            yield op


def _is_attention(scores: list[Op], products: list[tuple[Op, Value]]) -> bool:
    """Whether keys and values are both learned, as in a memory, or neither is."""
    learned_keys = all(_is_linear(matmul) for matmul in scores)
    return any(_has_learned_values(*product) == learned_keys for product in products)


def _softmax_input(op: Op) -> Value | None:
    """The scores of a softmax, also of one that is written out as exp / sum(exp)."""
    if op.name in ("_softmax", "_safe_softmax"):
        return first(op)
    if op.name == "div" and len(op.inputs) == 2:
        above, below = origin(op.inputs[0]), origin(op.inputs[1])
        while below.maker is not None and below.maker.name in ("add", "clamp", "clamp_min"):
            below = origin(below.maker.inputs[0])
        written_out = (
            above.maker is not None
            and above.maker.name in ("exp", "exp2")
            and below.maker is not None
            and below.maker.name == "sum"
            and origin(below.maker.inputs[0]) is above
        )
        return first(above.maker) if written_out and above.maker is not None else None
    if op.name == "exp":
        inner = first(op)
        if inner is None or inner.maker is None:
            return None
        if inner.maker.name == "_log_softmax":
            return first(inner.maker)
        if inner.maker.name == "sub" and len(inner.maker.inputs) == 2:
            subtracted = origin(inner.maker.inputs[1]).maker
            if subtracted is not None and subtracted.name == "logsumexp":
                return inner.maker.inputs[0]
    return None


def _products_with(probabilities: Value) -> Iterator[tuple[Op, Value]]:
    """(product, probabilities as it reads them) for every product that reads the probabilities."""
    todo, seen = [probabilities], {probabilities}
    while todo:
        value = todo.pop()
        for user in value.users:
            if user.name in MATMULS and value in operands(user):
                yield user, value
            elif user.name in _PROBABILITIES:
                for out in user.outputs[:1] if user.name == "native_dropout" else user.outputs:
                    if out not in seen:
                        seen.add(out)
                        todo.append(out)


def _score_matmuls(scores: Value) -> Iterator[Op]:
    """The products that the scores come from, through elementwise operators only."""
    todo, seen = [scores], {scores}
    while todo:
        maker = todo.pop().maker
        if maker is None:
            continue
        if maker.name in MATMULS:
            yield maker
        elif maker.name in _SCORES:
            for value in maker.inputs:
                if value not in seen:
                    seen.add(value)
                    todo.append(value)


def _is_linear(matmul: Op) -> bool:
    """Whether the keys of the scores are learned weights."""
    return origin(operands(matmul)[1]).is_parameter


def _has_learned_values(product: Op, probabilities: Value) -> bool:
    """Whether the other factor is a weight, or a linear layer's result for a weight."""
    left, right = operands(product)
    values = origin(right if left is probabilities else left)
    if values.maker is not None and values.maker.name in MATMULS:
        values = origin(operands(values.maker)[0])
    return values.is_parameter
