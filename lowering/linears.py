"""Lowering of linears with a norm, a gate or a residual around them: a kernel, or the products that the author has.

Where kernels are known to be faster their launcher chooses, under max-autotune too. Elsewhere what competes there is
their configurations and the formula, whose products Inductor tunes as it would in the graph: cuBLAS, its templates with
what they fuse, and for one row its reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infuse import build
from infuse.lowering import inductor, profit
from infuse.lowering.decisions import Decision, record
from infuse.lowering.heuristics import linears as heuristics
from infuse.ops import library, linear_kernels

FORMULA = "decomposition"


def _possible(kind: str, args: Sequence[Any]) -> tuple[dict[str, linear_kernels.Sizes], str]:
    """The families that may run here, and why there is none."""
    if inductor.settings_in_effect().kernels == "never":
        return {}, "kernels are switched off"
    if reason := library.missing(args[0].get_device()):
        return {}, reason
    with inductor.fake_mode():
        found, reason = linear_kernels.families(kind, inductor.examples(args))
    return found, reason


def _choice_of(kind: str) -> Any:
    operator = getattr(torch.ops.infuse, f"{kind}_kernel")

    def run(*tensors: Tensor, out: Tensor, form: tuple[Any, ...], family: str, config: int) -> Tensor:
        """What a measurement calls: the kernel, which allocates its results itself."""
        operator(*filled(form, iter(tensors)), family, config)
        return out

    # The source's id is in the name, which is part of the key of Inductor's autotuning cache.
    return inductor.kernel_choice(f"infuse_{kind}_{build.source_id()}", run)


_CHOICES = {kind: _choice_of(kind) for kind in linear_kernels.KINDS}


def form(args: Sequence[Any]) -> tuple[Any, ...]:
    """An operator's arguments with `...` for each tensor: plain values, which name a candidate in Inductor's cache."""
    return tuple(
        form(arg) if isinstance(arg, (list, tuple)) else ... if inductor.is_tensor(arg) else arg for arg in args
    )


def filled(form: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """The arguments again, with tensors in their places."""
    return [
        filled(item, tensors) if isinstance(item, tuple) else next(tensors) if item is ... else item for item in form
    ]


def _measure(kind: str, args: Sequence[Any], found: Iterable[str], formula: Callable[..., Any]) -> dict[str, float]:
    """Milliseconds of every configuration, and of the formula."""
    given = form(args)
    kernels = {
        f"{family}_{config}": inductor.Kernel(_CHOICES[kind], {"form": given, "family": family, "config": config})
        for family in found
        for config in range(-1, len(library.configurations(linear_kernels.CONFIGURATIONS[family])))
    }
    layout = inductor.output_layout(formula, args)
    tensors = inductor.tensors_of(args)
    ends = {i: _ends_of(args[0]) for i, tensor in enumerate(tensors) if tensor.get_dtype() == torch.int32}
    # Activations were written a moment ago; weights were last read a step ago.
    rows = inductor.hints(args[0])[:-1]
    weights = [i for i, tensor in enumerate(tensors) if inductor.hints(tensor)[:-1] != rows]
    return inductor.measure(
        f"infuse_{kind}", kernels, {FORMULA: formula}, args, layout, tune_products=True, values=ends, cold=weights
    )


def _ends_of(x: Any) -> Callable[[Any], Tensor]:
    """Makes the ends of groups of the rows of x, all of one size: with Inductor's own numbers most rows have none."""
    rows, _ = inductor.rows_and_row_size(x)

    def make(node: Any) -> Tensor:
        (groups,) = inductor.hints(node)
        ends = torch.linspace(rows / groups, rows, groups, device=node.get_device())
        return ends.round().to(node.get_dtype())

    return make


def known_family(kind: str, found: Mapping[str, linear_kernels.Sizes], device: torch.device) -> tuple[str, str]:
    """The family that is taken without a measurement, "" for none, and why. found: those that may run."""
    if found and inductor.settings_in_effect().kernels == "always":
        return next(iter(found)), "kernels are always taken"
    is_known = heuristics.beats_tuned if inductor.max_autotune() else heuristics.runs_well
    capability = library.capability(device)
    known = (family for family, sizes in found.items() if is_known(kind, family, sizes, capability))
    return next(known, ""), "by stored measurements"


def _choose(kind: str, args: Sequence[Any], formula: Callable[..., Any]) -> tuple[str, str, Mapping[str, float]]:
    """Label, why, and what was measured."""
    found, reason = _possible(kind, args)
    if not found:
        return FORMULA, reason, {}
    known, why = known_family(kind, found, args[0].get_device())
    if known or not inductor.max_autotune():
        return f"{known}_-1" if known else FORMULA, why, {}
    timings = _measure(kind, args, found, formula)
    label, _ = profit.choose(timings, FORMULA, 1, 0)
    return label, "measured", timings


def lower(kind: str, given: Sequence[Any]) -> Any:
    """The IR node, or nodes, of the results. given: the arguments of `infuse::<kind>`, IR nodes for tensors."""
    args = linear_kernels.with_defaults(kind, given)
    site = linear_kernels.KINDS[kind]
    label, why, timings = _choose(kind, args, site.formula)
    described = f"{'x'.join(map(str, inductor.hints(args[0])))} {args[0].get_dtype()}"
    record(Decision(kind, described, label, why, timings, site=inductor.current_site()))
    if label == FORMULA:
        return inductor.inline(getattr(torch.ops.infuse, kind).parts, *args)
    family, _, config = label.partition("_")
    operator = getattr(torch.ops.infuse, f"{kind}_kernel").default
    weights = [arg for given in args if isinstance(given, (list, tuple)) for arg in given if inductor.is_tensor(arg)]
    results = inductor.call_operator(operator, *args, family, int(config), as_they_lie=weights)
    return results[0] if site.returns == "Tensor" else results


def _register(kind: str) -> None:
    inductor.register(getattr(torch.ops.infuse, kind).default, lambda *args: lower(kind, args))


for _kind in linear_kernels.KINDS:
    _register(_kind)
