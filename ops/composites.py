"""Registers operators that stand for several others, such as a norm and the linears behind it.

No kernel need exist for one: `default` computes its formula and differentiates by recomputing it, keeping nothing but
its inputs; `inline` is what the author wrote; `parts` is the formula in operators that are kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from infuse.ops.registration import define, differentiate, implement, register, with_defaults

Formula = Callable[..., Any]


def register_composite(
    name: str,
    arguments: str,
    returns: str,
    *,
    formula: Formula,
    inline: Formula,
    parts: Formula,
    like_x: bool = False,
    differentiable: Formula | None = None,
) -> None:
    """Defines the three overloads. The formulas take the operator's arguments, lists of tensors among them, and return
    a tensor or a list of them.

    like_x: the result's dimensions lie in memory in the order of the first argument's, instead of contiguously.
    differentiable: called first where gradients are wanted; the result, with a backward of its own, or None where that
        has no answer.
    """

    def implementation(*args: Any) -> Any:
        if like_x:
            result = formula(*args)
            return torch.empty_like(args[0], dtype=result.dtype).copy_(result)
        return pytree.tree_map_only(Tensor, lambda result: result.contiguous(), formula(*args))

    register(name, arguments, returns, implementation=implementation, fake=implementation)
    operator = getattr(torch.ops.infuse, name).default
    apply: Formula = _Composite.apply

    def dispatch(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            if differentiable is not None and (result := differentiable(*args)) is not None:
                return result
            results: tuple[Tensor, ...] = apply(operator, formula, spec, *leaves)
            return results[0] if returns == "Tensor" else list(results)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    implement(name, with_defaults(operator, dispatch), "Autograd")
    for overload, function in (("inline", inline), ("parts", parts)):
        define(f"{name}.{overload}({arguments}) -> {returns}")
        implement(f"{name}.{overload}", function, "CompositeImplicitAutograd")


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, formula: Formula, spec: Any, *leaves: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.formula, ctx.spec = formula, spec
        return _tuple(operator(*pytree.tree_unflatten(leaves, spec)))

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [plain if saved is None else saved for saved, plain in zip(ctx.saved_tensors, ctx.leaves)]
        grads: Sequence[Tensor | None] = differentiate(
            lambda *flat: _tuple(ctx.formula(*pytree.tree_unflatten(flat, ctx.spec))), leaves, douts
        )
        if not torch.is_grad_enabled():
            grads = [None if grad is None else grad.detach() for grad in grads]
        return None, None, None, *grads


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
