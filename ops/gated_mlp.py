"""A gated MLP that trains: gate and up projections, activation, down projection.

    y = linear_swiglu(x, weights, biases, order) @ down_weight^T + down_bias

Shapes: x [..., D]; weights, biases, order as of infuse.ops.linear_swiglu; down_weight [E, F]; down_bias [E] or None;
y [..., E]; one dtype.

What lives until the backward, of the activations: x and the gate and up projections, [..., 2F] (overload `default`), or
x alone (overload `recompute`, which multiplies by the weights of gate and up once more). Autograd by itself keeps
[..., 4F] beside x. All else is computed again where it is needed (infuse.ops.gated_mlp_passes); the products that give
the weights' gradients, and the down projection, stay torch's own.

Where x is rms_norm(norm_input, norm_weight, ...), norm_input, which the norm's own backward needs, may be given: then x
is computed again too, instead of kept. No gradient flows to it from here: the norm's is x's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import gated_mlp_passes as _passes  # noqa: F401  importing an operator's module registers it
from infuse.ops import rms_norm
from infuse.ops.composites import register_composite
from infuse.ops.linear_swiglu import check, formula_with, halves, joined, linear_swiglu_ref, split_gate_up
from infuse.ops.norm_linear import check_linears
from infuse.ops.registration import define, differentiate, implement, register_fake, with_defaults
from infuse.ops.swiglu import FLAGS, NUM_FLAGS, swiglu_ref

ARGUMENTS = (
    f"Tensor x, Tensor[] weights, Tensor?[] biases, str order, Tensor down_weight, Tensor? down_bias, {FLAGS}, "
    f"Tensor? norm_input=None, Tensor? norm_weight=None, float norm_eps=0.0, {rms_norm.FLAGS}"
)


def _formula(activate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula out of the fused projections and activation."""

    def gated_mlp(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        order: str,
        down_weight: Tensor,
        down_bias: Tensor | None,
        *flags: Any,
    ) -> Tensor:
        check("gated_mlp", x, weights, biases, order, down_weight)
        h = activate(x, weights, biases, order, *flags[:NUM_FLAGS])
        check_linears("gated_mlp", h.shape[-1], [down_weight], [down_bias])
        return F.linear(h, down_weight, down_bias)

    return gated_mlp


gated_mlp_ref = _formula(linear_swiglu_ref)


class _GatedMLP(torch.autograd.Function):
    """keeps: whether gate_up is saved. norm: what follows norm_weight. The weights come after the other arguments: one
    packed, or gate and up."""

    @staticmethod
    def forward(
        ctx: Any,
        keeps: bool,
        order: str,
        flags: tuple[Any, ...],
        norm: tuple[Any, ...],
        x: Tensor,
        norm_input: Tensor | None,
        norm_weight: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        *given: Tensor | None,
    ) -> Tensor:
        weights, biases = _weights_and_biases(given)
        check("gated_mlp", x, weights, biases, order, down_weight)
        check_linears("gated_mlp", down_weight.shape[1], [down_weight], [down_bias])
        if keeps:
            h, gate_up = torch.ops.infuse.linear_swiglu_fwd(x, weights, biases, order, *flags)
        else:
            h, gate_up = torch.ops.infuse.linear_swiglu(x, weights, biases, order, *flags), None
        x_again = (x, None, None) if norm_input is None else (None, norm_input, norm_weight)
        ctx.save_for_backward(gate_up, *x_again, down_weight, down_bias, *given)
        ctx.order, ctx.flags, ctx.norm = order, flags, norm
        return F.linear(h, down_weight, down_bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, x, norm_input, norm_weight, down_weight, down_bias, *given = ctx.saved_tensors
        _, _, _, _, needs_x, _, _, needs_down, needs_down_bias, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            x = rms_norm.rms_norm_ref(norm_input, norm_weight, *ctx.norm) if x is None else x
            dx, *grads = differentiate(_flat(ctx.order, ctx.flags), (x, down_weight, down_bias, *given), (dy,))
            return None, None, None, None, dx, None, None, *grads
        if x is None and (any(needs) or gate_up is None):
            x = torch.ops.infuse.rms_norm_again(dy, norm_input, norm_weight, *ctx.norm)
        weights, biases = _weights_and_biases(given)
        of_projections = (x, weights, biases, ctx.order)
        inside = needs_x or any(needs)
        dgate_up, h = _inside(dy, gate_up, of_projections, down_weight, ctx.flags, inside, needs_down)
        return (
            *(None, None, None, None),
            _dx(dgate_up, weights, biases, ctx.order) if needs_x else None,
            *(None, None),
            _rows(dy).t() @ _rows(h) if needs_down else None,
            _rows(dy).sum(0) if needs_down_bias else None,
            *_parameters(dgate_up, x, given, needs, ctx.order),
        )


def _weights_and_biases(given: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    number = len(given) // 2
    return list(given[:number]), list(given[number:])


def _flat(order: str, flags: tuple[Any, ...]) -> Callable[..., Tensor]:
    """The formula with its tensors as separate arguments."""

    def formula(x: Tensor, down_weight: Tensor, down_bias: Tensor | None, *given: Tensor | None) -> Tensor:
        return gated_mlp_ref(x, *_weights_and_biases(given), order, down_weight, down_bias, *flags)

    return formula


def _inside(
    dy: Tensor,
    gate_up: Tensor | None,
    of_projections: tuple[Tensor, list[Tensor], list[Tensor | None], str],
    down_weight: Tensor,
    flags: tuple[Any, ...],
    wants_dgate_up: bool,
    wants_h: bool,
) -> tuple[Tensor, Tensor]:
    """(dgate_up, h), gate_up being computed again if it was not kept; what is not wanted is empty.

    of_projections: x, weights, biases and order.
    """
    operators = torch.ops.infuse
    nothing = dy.new_empty(0)
    result: tuple[Tensor, Tensor] = (nothing, nothing)
    if wants_dgate_up and gate_up is None:
        result = operators.recomputed_gated_bwd(dy, *of_projections, down_weight, *flags, wants_h)
    elif wants_dgate_up:
        result = operators.linear_gated_bwd(dy, down_weight, gate_up, *flags, wants_h)
    elif wants_h and gate_up is None:
        result = nothing, operators.linear_swiglu(*of_projections, *flags)
    elif wants_h and gate_up is not None:
        result = nothing, swiglu_ref(*halves(gate_up, "gate_up"), *flags)
    return result


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _dx(dgate_up: Tensor, weights: list[Tensor], biases: list[Tensor | None], order: str) -> Tensor:
    """One product with the packed weight as it lies where that is possible, which is how the author has it too."""
    if len(weights) == 1 and order == "gate_up":
        return dgate_up @ weights[0]
    gate_weight, up_weight, _, _ = split_gate_up(weights, biases, order)
    return torch.ops.infuse.linear_pair(dgate_up, gate_weight, up_weight)  # type: ignore[no-any-return]


def _parameters(
    dgate_up: Tensor, x: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool], order: str
) -> list[Tensor | None]:
    """The gradients of the weights and biases of gate and up: no product for those that need none."""
    if not any(needs):
        return [None for _ in given]
    number = len(given) // 2
    d, rows = _rows(dgate_up), _rows(x)
    # One piece for a packed weight, in the order that it has; one each for two.
    pieces = [d] if number == 1 else list(halves(d, "gate_up"))
    weights = [piece.t() @ rows if need else None for piece, need in zip(pieces, needs[:number])]
    biases = [piece.sum(0) if need else None for piece, need in zip(pieces, needs[number:])]
    if number == 1 and order != "gate_up":
        weights, biases = (
            [None if grad is None else _ordered(grad, order) for grad in grads] for grads in (weights, biases)
        )
    return [*weights, *biases]


def _ordered(grad: Tensor, order: str) -> Tensor:
    """The gradient of a packed parameter out of one whose gate half comes first."""
    dgate, dup = halves(grad, "gate_up", 0)
    return joined(dgate, dup, order, 0)


def _differentiable(keeps: bool) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = _GatedMLP.apply

    def apply(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        order: str,
        down_weight: Tensor,
        down_bias: Tensor | None,
        *flags: Any,
    ) -> Tensor:
        norm_input, norm_weight, *norm = flags[NUM_FLAGS:]
        options = (keeps, order, flags[:NUM_FLAGS], tuple(norm))
        result: Tensor = function(*options, x, norm_input, norm_weight, down_weight, down_bias, *weights, *biases)
        return result

    return apply


register_composite(
    "gated_mlp",
    ARGUMENTS,
    "Tensor",
    formula=gated_mlp_ref,
    inline=gated_mlp_ref,
    parts=_formula(formula_with(torch.ops.infuse.swiglu)),
    differentiable=_differentiable(keeps=True),
)
define(f"gated_mlp.recompute({ARGUMENTS}) -> Tensor")
_operator = torch.ops.infuse.gated_mlp


def _implementation(*args: Any) -> Tensor:
    result: Tensor = _operator.default(*args)
    return result


implement("gated_mlp.recompute", _implementation, "CompositeExplicitAutograd")
register_fake("gated_mlp.recompute", _implementation)
implement("gated_mlp.recompute", with_defaults(_operator.recompute, _differentiable(keeps=False)), "Autograd")
