"""Operators whose formula comes from outside the package: a plain torch function of tensors and numbers.

The schema is read from the function's annotations: Tensor, Tensor | None, float, int and bool, and one Tensor as the
result. The backward is autograd's of the formula; the result is contiguous.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infuse.ops.registration import differentiate, register_differentiable

Formula = Callable[..., Tensor]
_TYPES: dict[object, str] = {Tensor: "Tensor", float: "float", int: "int", bool: "bool"}


def define(name: str, formula: Formula) -> None:
    """Registers `infuse::<name>`. Raises ValueError for a signature that no schema has, or a name that is taken."""
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"infuse: operator: got the name {name!r}, expected a lower-case identifier")
    if hasattr(torch.ops.infuse, name):
        raise ValueError(f"infuse: operator: got the name {name!r}, expected one that is not taken")
    arguments = schema_of(formula)

    def implementation(*args: Any) -> Tensor:
        return formula(*args).contiguous()

    def fake(*args: Any) -> Tensor:
        result = formula(*args)
        return result.new_empty(result.shape)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
            ctx.plain = tuple(None if isinstance(arg, Tensor) else arg for arg in args)
            ctx.is_tensor = tuple(isinstance(arg, Tensor) for arg in args)
            return getattr(torch.ops.infuse, name)(*args)  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
            tensors = iter(ctx.saved_tensors)
            args = [next(tensors) if is_tensor else plain for is_tensor, plain in zip(ctx.is_tensor, ctx.plain)]
            return differentiate(formula, args, douts)

    register_differentiable(
        name,
        arguments,
        "Tensor",
        implementation=implementation,
        inline=formula,
        fake=fake,
        autograd=Differentiable.apply,
    )


def schema_of(formula: Formula) -> str:
    """ "Tensor gate, float beta=1.0" from the annotations. Raises ValueError."""
    hints = typing.get_type_hints(formula)
    if hints.get("return") is not Tensor:
        raise ValueError(f"infuse: {_name(formula)}: returns {hints.get('return')}, expected the annotation -> Tensor")
    parts = []
    for parameter in inspect.signature(formula).parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default}"
        parts.append(f"{_type(formula, parameter.name, hints.get(parameter.name))} {parameter.name}{default}")
    if not parts or not parts[0].startswith("Tensor "):
        raise ValueError(f"infuse: {_name(formula)}: got ({', '.join(parts)}), expected a Tensor first")
    return ", ".join(parts)


def _type(formula: Formula, name: str, hint: Any) -> str:
    if hint in _TYPES:
        return _TYPES[hint]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else ()
    if set(options) == {Tensor, type(None)}:
        return "Tensor?"
    expected = "Tensor, Tensor | None, float, int or bool"
    raise ValueError(f"infuse: {_name(formula)}: {name}: got the annotation {hint}, expected {expected}")


def _name(formula: Formula) -> str:
    return getattr(formula, "__qualname__", repr(formula))
