"""Rotations of pairs in a record: the products of a tensor's halves (or neighbours) with cosines and sines."""

from __future__ import annotations

from collections.abc import Iterator

from census.trace import Key, Op, Value, first, origin, part

Product = frozenset[Key]


def sites(ops: list[Op]) -> Iterator[Op]:
    """One operator for each tensor that is rotated."""
    yield from _complex(ops)
    yield from _rotated_copies(ops)
    yield from _pairs(ops)
    yield from _matrices(ops)


def _complex(ops: list[Op]) -> Iterator[Op]:
    """view_as_complex(x) * frequencies."""
    for op in ops:
        if op.name != "mul" or not op.outputs or not op.out.dtype.is_complex:
            continue
        if any(_is_complex_view(value) for value in op.inputs):
            yield op


def _is_complex_view(value: Value) -> bool:
    while value.maker is not None and value.maker.name in ("view", "unsqueeze", "transpose", "permute", "_to_copy"):
        value = value.maker.inputs[0]
    if value.maker is None or value.maker.name != "view_as_complex":
        return value.maker is not None and value.maker.name == "complex" and value.maker.inputs[0].maker is not None
    return True


def _rotated_copies(ops: list[Op]) -> Iterator[Op]:
    """x * cos + (-x2, x1) * sin: a copy of x is made whose halves or neighbours have changed places."""
    for op in ops:
        if op.name not in ("cat", "stack") or len(op.inputs) != 2:
            continue
        negated, plain = op.inputs
        maker = origin(negated).maker
        if maker is None or maker.name != "neg":
            negated, plain = plain, negated
            maker = origin(negated).maker
        if maker is None or maker.name != "neg":
            continue
        (left, left_part), (right, right_part) = part(maker.inputs[0]), part(plain)
        if left is right and left_part != right_part:
            yield from _sums_of_products(op.out, limit=1)


def _sums_of_products(rotated: Value, limit: int) -> Iterator[Op]:
    """The sums that a rotated copy, times something, ends in."""
    todo = [(rotated, False)]
    while todo:
        value, multiplied = todo.pop()
        for user in value.users:
            if user.name in ("addcmul",) or (multiplied and user.name == "add"):
                yield user
                return
            if user.name == "mul" and not multiplied:
                todo.append((user.out, True))
            elif first(user) is value and user.outputs and origin(user.out) is origin(value):
                todo.append((user.out, multiplied))


def _pairs(ops: list[Op]) -> Iterator[Op]:
    """a = x1 * c - x2 * s together with b = x2 * c + x1 * s, whatever is done with a and b."""
    sums: dict[frozenset[Product], Op] = {}
    for op in ops:
        if op.name in ("add", "addcmul"):
            products = _products(op)
            if products is not None:
                sums.setdefault(frozenset(products), op)
    used: set[Op] = set()
    for op in ops:
        products = _products(op) if op.name in ("sub", "addcmul") else None
        if products is None:
            continue
        for wanted in _partners(*products):
            partner = sums.get(wanted)
            if partner is not None and partner not in used and partner is not op:
                used.add(partner)
                yield op
                break


def _matrices(ops: list[Op]) -> Iterator[Op]:
    """x1 * M[..., 0] + x2 * M[..., 1], a pair times a matrix of two by two."""
    for op in ops:
        makers = [value.maker for value in op.inputs] if op.name == "add" and op.out.shape[-1:] == (2,) else []
        factors = [maker.inputs for maker in makers if maker is not None and maker.name == "mul"]
        elements = [part(value) for pair in factors for value in pair if value.shape[-1:] == (1,)]
        if len(factors) == 2 and len(elements) == 2 and elements[0] != elements[1] and elements[0][0] is elements[1][0]:
            yield op


def _products(op: Op) -> tuple[Product, Product] | None:
    """The two products that a sum or a difference is made of."""
    if op.name == "addcmul":
        head = origin(op.inputs[0]).maker
        if head is None or head.name != "mul" or len(head.inputs) != 2 or len(op.inputs) != 3:
            return None
        return _factors(head.inputs), _factors(op.inputs[1:])
    if len(op.inputs) != 2:
        return None
    makers = [origin(value).maker for value in op.inputs]
    if any(maker is None or maker.name != "mul" or len(maker.inputs) != 2 for maker in makers):
        return None
    left, right = (_factors(maker.inputs) for maker in makers if maker is not None)
    return left, right


def _factors(values: list[Value]) -> Product:
    return frozenset(part(value) for value in values)


def _partners(left: Product, right: Product) -> Iterator[frozenset[Product]]:
    """For x1 * c - x2 * s: {x2 * c, x1 * s}, for every way to tell x from its factor."""
    for x1 in left:
        for x2 in right:
            if x1[0] is x2[0] and x1 != x2:
                (c,) = (left - {x1}) or {x1}
                (s,) = (right - {x2}) or {x2}
                yield frozenset((frozenset((x2, c)), frozenset((x1, s))))
