"""Lowering of infuse::rms_norm: the decomposition, inlined, unless the CUDA kernel wins in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import inductor, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import rms_norm as heuristics
from infuse.ops import library
from infuse.ops import rms_norm as op

FORMULA = "decomposition"
# The formula alone reads x and writes y.
FORMULA_PASSES = 2


def run_kernel(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    eps_as_minimum: bool,
    kernel_config: int,
    out: Tensor,
) -> Tensor:
    """What generated code calls: the kernel, writing into `out`."""
    flags = (weight_offset, cast_before_weight, eps_as_minimum)
    torch.ops.infuse.rms_norm_out(x, weight, eps, *flags, kernel_config, out)
    return out


# The source's id is in the name, which is part of the key of Inductor's autotuning cache.
_CHOICE = inductor.kernel_choice(f"infuse_rms_norm_{build.source_id()}", run_kernel)


def decline(x: Any, weight: Any, eps: object, weight_offset: object) -> str:
    """Why no kernel may run here, "" when one may."""
    if inductor.settings_in_effect().kernels == "never":
        return "kernels are switched off"
    if reason := library.missing(x.get_device()):
        return reason
    if not isinstance(eps, float) or not isinstance(weight_offset, (int, float)):
        return "eps is symbolic"
    with inductor.fake_mode():
        x_fake = inductor.example(x)
        weight_fake = None if weight is None else inductor.example(weight)
        return op.can_run(x_fake, weight_fake)


def lower(
    x: Any,
    weight: Any,
    eps: Any,
    weight_offset: Any = 0.0,
    cast_before_weight: bool = False,
    eps_as_minimum: bool = False,
) -> Any:
    """The IR node of y."""
    args = (x, weight, eps, weight_offset, cast_before_weight, eps_as_minimum)
    problem = heuristics.Problem(*inductor.rows_and_row_size(x), itemsize=x.get_dtype().itemsize)
    described = f"{problem.rows}x{problem.row_size} {x.get_dtype()}"
    layout = inductor.output_layout(op.rms_norm_fake, args)
    tensors = [tensor for tensor in (x, weight) if tensor is not None]
    flags = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight, "eps_as_minimum": eps_as_minimum}
    keywords = {"eps": eps, **flags}

    def kernel(config: int) -> inductor.Kernel:
        return inductor.Kernel(_CHOICE, {**keywords, "kernel_config": config})

    def take(label: str, why: str, timings: Any = None, costs: Any = None) -> Any:
        record(Decision("rms_norm", described, label, why, timings or {}, costs or {}, inductor.current_site()))
        if label == FORMULA:
            return inductor.inline(op.rms_norm_ref, *args)
        return inductor.call_kernel(kernel(configs[label]), tensors, layout)

    configs = {f"kernel_{config}": config for config in (-1,)}
    if reason := decline(x, weight, eps, weight_offset):
        return take(FORMULA, reason)
    if inductor.settings_in_effect().kernels == "always":
        return take("kernel_-1", "kernels are always taken")
    if not inductor.max_autotune():
        well = heuristics.runs_well(problem)
        return take("kernel_-1" if well else FORMULA, "heuristic")
    names = {-1: "chosen by the launcher", **dict(enumerate(library.configurations("norm")))}
    configs = {f"kernel_{config}": config for config in heuristics.configurations(problem, len(names) - 1)}
    kernels = {label: kernel(config) for label, config in configs.items()}
    timings = inductor.measure("infuse_rms_norm", kernels, {FORMULA: op.rms_norm_ref}, args, layout)
    around = inductor.neighbours(x, inductor.current_node())
    label, costs = profit.choose(timings, FORMULA, FORMULA_PASSES, around.passes)
    return take(label, f"measured; fusing with the neighbours saves {around.passes} passes", timings, costs)


inductor.register(torch.ops.infuse.rms_norm.default, lower)
inductor.register_inline(torch.ops.infuse.rms_norm_fwd.default, op.rms_norm_fwd_ref)
inductor.register_inline(torch.ops.infuse.rms_norm_bwd.default, op.rms_norm_bwd_ref)
