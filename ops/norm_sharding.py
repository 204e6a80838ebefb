"""How the norms may be sharded over devices: by any dimension but the last; weight and bias are whole everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from infuse.ops.registration import Function, Placements, register_sharding


def _row_placements(x: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate(), *(Shard(dim) for dim in range(len(x.shape) - 1))]


def _whole(vector: Any) -> Any:
    """The placement of a weight or a bias."""
    from torch.distributed.tensor import Replicate

    return None if vector is None else Replicate()


def _gradient_of(vector: Any, rows: Any) -> Any:
    """The placement of a weight's or a bias's gradient: sharded rows give partial sums of it."""
    from torch.distributed.tensor import Partial, Replicate

    return Replicate() if vector is None or rows.is_replicate() else Partial()


def _forward(tensors: int, vectors: int, results: int) -> Function:
    """The rule of an operator of `tensors` [..., D], `vectors` [D] or None, and plain values, in this order."""

    def rule(*args: Any) -> Placements:
        whole = [_whole(vector) for vector in args[tensors : tensors + vectors]]
        rest = [None] * (len(args) - tensors - vectors)
        return [([rows] * results, [*[rows] * tensors, *whole, *rest]) for rows in _row_placements(args[0])]

    return rule


def _backward(tensors: int, vectors: int, statistics: int, gradients: int) -> Function:
    """Likewise, with statistics [...] behind the vectors. The results are gradients [..., D] and one of each vector."""

    def rule(*args: Any) -> Placements:
        given = args[tensors : tensors + vectors]
        rest = [None] * (len(args) - tensors - vectors - statistics)
        rules: list[tuple[list[Any], list[Any]]] = []
        for rows in _row_placements(args[0]):
            inputs = [*[rows] * tensors, *map(_whole, given), *[rows] * statistics, *rest]
            rules.append(([*[rows] * gradients, *(_gradient_of(vector, rows) for vector in given)], inputs))
        return rules

    return rule


def _count(arguments: Sequence[Any], type_name: str) -> int:
    return sum(str(argument.type) == type_name for argument in arguments)


def register(kind: str) -> None:
    """The rules of `<kind>`, `<kind>_fwd`, which returns statistics too, and `<kind>_bwd`, by their schemas."""
    schema, fwd, bwd = (getattr(torch.ops.infuse, kind + suffix).default._schema for suffix in ("", "_fwd", "_bwd"))
    tensors, vectors = (_count(schema.arguments, name) for name in ("Tensor", "Optional[Tensor]"))
    results, statistics = len(schema.returns), len(fwd.returns) - len(schema.returns)
    register_sharding(kind, _forward(tensors, vectors, results))
    register_sharding(f"{kind}_fwd", _forward(tensors, vectors, results + statistics))
    tensors = _count(bwd.arguments, "Tensor") - statistics
    register_sharding(f"{kind}_bwd", _backward(tensors, vectors, statistics, len(bwd.returns) - vectors))
