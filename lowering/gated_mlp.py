"""Lowering of the pieces of a gated MLP that trains; see infuse.ops.gated_mlp_passes.

Each piece has a kernel, and torch's products with what remains to be done besides. Under max-autotune they compete for
each piece; otherwise the kernels run: by stored measurements the policy keeps such an MLP whole only where they pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import inductor
from infuse.lowering.decisions import Decision, record
from infuse.lowering.linears import FORMULA, filled, form
from infuse.ops import gated_backward_kernels, gated_linear_kernels, library, linear_kernels
from infuse.ops.gated_mlp_passes import (
    linear_gated_bwd_ref,
    linear_pair_ref,
    linear_swiglu_fwd_ref,
    recomputed_gated_bwd_ref,
)
from infuse.ops.linear_swiglu import halves
from infuse.ops.swiglu import swiglu_ref

PRODUCTS = "products"  # torch's, and what remains in a pass over memory
KERNEL = "kernel_"


@dataclass(frozen=True, slots=True)
class Piece:
    """infuse::<name>. kernel: the operator that runs its kernel, given `numbers` of the arguments and a configuration.

    configurations: name of their table. can_run, can_pass: why the kernel, and why what stands beside torch's products,
    cannot take the arguments, "" if they can. products: with those; formula: in plain torch.
    """

    name: str
    kernel: torch._ops.OpOverload
    arguments: Callable[..., tuple[Any, ...]]
    configurations: str
    can_run: Callable[..., str]
    can_pass: Callable[..., str]
    products: Callable[..., Any]
    formula: Callable[..., Any]

    def choice(self) -> Any:
        """The kernel as a candidate, which allocates its results itself."""

        def run(*tensors: Tensor, out: Tensor, form: tuple[Any, ...], config: int) -> Tensor:
            self.kernel(*filled(form, iter(tensors)), config)
            return out

        # The source's id is in the name, which is part of the key of Inductor's autotuning cache.
        return inductor.kernel_choice(f"infuse_{self.name}_{build.source_id()}", run)


def _with_limits(flags: Sequence[Any]) -> str:
    _, limit, _, up_offset, *_ = flags
    return "no kernel for a gate with limits" if limit is not None or up_offset != 0 else ""


def _forward_products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], order: str, *flags: Any
) -> tuple[Tensor, Tensor]:
    gate_up = torch.ops.infuse.gate_up_products(x, weights, biases, order)
    return swiglu_ref(*halves(gate_up, "gate_up"), *flags), gate_up


def _can_run_forward(*args: Any) -> str:
    found, reason = linear_kernels.families("linear_swiglu", args)
    return "" if "gated" in found else reason or "no kernel for so few rows"


def _backward_products(dy: Tensor, down_weight: Tensor, gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    activation, *_, wants_h = rest
    found: tuple[Tensor, Tensor] = torch.ops.infuse.gated_backward(dy @ down_weight, gate_up, activation, wants_h, -1)
    return found


def _can_pass_backward(dy: Tensor, down_weight: Tensor, gate_up: Tensor, *rest: Any) -> str:
    return _with_limits(rest) or gated_backward_kernels.can_differentiate(dy, gate_up, rest[0])


def _can_run_backward(dy: Tensor, down_weight: Tensor, gate_up: Tensor, *rest: Any) -> str:
    return gated_backward_kernels.can_differentiate_linear(dy, down_weight, gate_up, rest[0])


PIECES = (
    Piece(
        "linear_swiglu_fwd",
        torch.ops.infuse.linear_swiglu_fwd_kernel.default,
        lambda x, weights, biases, order, activation, *_: (x, weights, biases, order, activation),
        gated_linear_kernels.NAME,
        _can_run_forward,
        lambda *args: "",
        _forward_products,
        linear_swiglu_fwd_ref,
    ),
    Piece(
        "linear_gated_bwd",
        torch.ops.infuse.linear_gated_backward.default,
        lambda dy, weight, gate_up, activation, *rest: (dy, weight, gate_up, activation, rest[-1]),
        gated_backward_kernels.GEMMS,
        _can_run_backward,
        _can_pass_backward,
        _backward_products,
        linear_gated_bwd_ref,
    ),
    Piece(
        "linear_pair",
        torch.ops.infuse.linear_pair_product.default,
        lambda *args: args,
        gated_backward_kernels.GEMMS,
        gated_backward_kernels.can_multiply_pair,
        lambda *args: "",
        linear_pair_ref,
        linear_pair_ref,
    ),
)


def _choose(piece: Piece, choice: Any, args: Sequence[Any]) -> tuple[str, str, Mapping[str, float]]:
    """Label, why, and what was measured."""
    settings = inductor.settings_in_effect()
    if settings.kernels == "never" or inductor.writes_cpp():
        return FORMULA, "kernels are switched off", {}
    if reason := library.missing(args[0].get_device()):
        return FORMULA, reason, {}
    with inductor.fake_mode():
        examples = inductor.examples(args)
        if reason := piece.can_pass(*examples):
            return FORMULA, reason, {}
        if reason := piece.can_run(*examples):
            return PRODUCTS, reason, {}
    if settings.kernels == "always":
        return f"{KERNEL}-1", "kernels are always taken", {}
    if not inductor.max_autotune():
        return f"{KERNEL}-1", "by stored measurements, which keep the MLP whole", {}
    given = form(piece.arguments(*args))
    kernels = {
        f"{KERNEL}{config}": inductor.Kernel(choice, {"form": given, "config": config})
        for config in range(-1, len(library.configurations(piece.configurations)))
    }
    layout = inductor.output_layout(piece.formula, args)
    timings = inductor.measure(
        f"infuse_{piece.name}", kernels, {PRODUCTS: piece.products}, args, layout, tune_products=True
    )
    return min(timings, key=timings.__getitem__, default=PRODUCTS), "measured", timings


def lower(piece: Piece, choice: Any, args: Sequence[Any]) -> Any:
    """The IR nodes of the results. args: of infuse::<name>, IR nodes for tensors."""
    label, why, timings = _choose(piece, choice, args)
    described = f"{'x'.join(map(str, inductor.hints(args[0])))} {args[0].get_dtype()}"
    record(Decision(piece.name, described, label, why, timings, site=inductor.current_site()))
    if not label.startswith(KERNEL):
        return inductor.inline(piece.products if label == PRODUCTS else piece.formula, *args)
    config = int(label.removeprefix(KERNEL))
    given = piece.arguments(*args)
    results = inductor.call_operator(piece.kernel, *given, config, as_they_lie=inductor.tensors_of(given))
    return results if len(results) > 1 else results[0]


def _register(piece: Piece) -> None:
    choice = piece.choice()
    inductor.register(getattr(torch.ops.infuse, piece.name).default, lambda *args: lower(piece, choice, args))


for _piece in PIECES:
    _register(_piece)
inductor.register_inline(torch.ops.infuse.recomputed_gated_bwd.default, recomputed_gated_bwd_ref)
