"""The one place where operators are defined, implemented and given their sharding rules.

Every operator `infuse::<op>` has two overloads with the same arguments:
- `default` stays one node through AOTAutograd: its backward is an operator of its own, and the lowering chooses what
  runs;
- `inline` is CompositeImplicitAutograd: AOTAutograd sees the plain formula, as if the author had written that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

# "DEF" raises on a second registration, which is how a double import shows.
_LIBRARY = torch.library.Library("infuse", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

Function = Callable[..., Any]
Placements = Sequence[tuple[list[Any], list[Any]]]


def define(schema: str) -> None:
    """Declares `infuse::<schema>`."""
    _LIBRARY.define(schema, tags=_TAGS)


def implement(name: str, function: Function, key: str) -> None:
    """Registers `function` for a dispatch key ("CompositeExplicitAutograd", "CUDA", "Autograd", ...)."""
    _LIBRARY.impl(name, function, key)


def register_fake(name: str, function: Function) -> None:
    """Registers what stands for an operator while tracing: shapes, dtypes and strides of its results."""
    torch.library.register_fake(f"infuse::{name}", function, lib=_LIBRARY)


def register(name: str, arguments: str, returns: str, *, implementation: Function, fake: Function) -> None:
    """Defines an operator with one implementation for all devices, and a fake one for shapes, dtypes and strides."""
    define(f"{name}({arguments}) -> {returns}")
    implement(name, implementation, "CompositeExplicitAutograd")
    register_fake(name, fake)


def register_differentiable(
    name: str,
    arguments: str,
    returns: str,
    *,
    implementation: Function,
    inline: Function,
    fake: Function,
    autograd: Function,
    is_random: Function = lambda *args: False,
) -> None:
    """Defines both overloads of an operator that the rewrite emits.

    autograd: called with the operator's arguments when one of them requires grad (an `autograd.Function`'s `apply`).
    is_random: whether random numbers are drawn for these arguments. `autograd` then is called in any case, and draws
        them as an operator of its own, so that this one stays a function of what it is given.
    """
    register(name, arguments, returns, implementation=implementation, fake=fake)
    operator = getattr(torch.ops.infuse, name).default

    def dispatch(*args: Any) -> Any:
        if is_random(*args) or (torch.is_grad_enabled() and any(_needs_grad(arg) for arg in args)):
            return autograd(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    implement(name, with_defaults(operator, dispatch), "Autograd")
    define(f"{name}.inline({arguments}) -> {returns}")
    implement(f"{name}.inline", inline, "CompositeImplicitAutograd")


def differentiate(formula: Function, inputs: Sequence[object], douts: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of each input by autograd through the formula, itself differentiable where gradients are enabled.

    Differentiated with respect to aliases: an input may be an output of the very node whose backward this is, and the
    engine would look for the other inputs behind it, in that node, again and again.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [value.view_as(value) if _needs_grad(value) else value for value in inputs]
        outputs = formula(*aliases)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = [alias for alias in aliases if _needs_grad(alias)]
    found = iter(torch.autograd.grad(outputs, wanted, douts, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if _needs_grad(alias) else None for alias in aliases)


def _needs_grad(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.requires_grad


def with_defaults(operator: torch._ops.OpOverload, function: Function) -> Function:
    """Fills in the schema's default values, which the dispatcher leaves out when it calls a Python kernel."""
    arguments = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    names = [argument.name for argument in arguments]

    def filled(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(names, args)), **kwargs}
        return function(*(given[name] for name in names))

    return filled


def register_sharding(name: str, rule: Callable[..., Placements]) -> None:
    """Tells DTensor how `infuse::<name>` (both overloads, if there are two) may be sharded.

    rule: gets the operator's arguments (tensors as DTensorSpec) and returns pairs (output placements, input
    placements), one entry an argument, None for those that are no tensors.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor.experimental import register_sharding as dtensor_register

    packet = getattr(torch.ops.infuse, name)
    dtensor_register(packet.default)(with_defaults(packet.default, rule))
