"""Which form the rewrite emits for linears with a norm, a gate or a residual around them.

See infuse.lowering.policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from infuse.lowering.heuristics import linears as heuristics
from infuse.ops import library, linear_kernels
from infuse.report import Placement
from infuse.settings import Settings

KINDS = tuple(linear_kernels.KINDS)


def place_linears(
    kind: str, given: Sequence[object], training: bool, settings: Settings, max_autotune: bool
) -> Placement:
    """The operator where a kernel may run; elsewhere its parts stay sites of their own."""
    x = given[0]
    assert isinstance(x, Tensor)
    reason = _cannot_run(training, settings) or library.missing(x.device)
    if reason:
        return _declined(reason)
    found, reason = linear_kernels.families(kind, linear_kernels.with_defaults(kind, given))
    if not found:
        return _declined(reason)
    if settings.kernels == "always":
        return Placement("default", "kernel")
    if max_autotune:
        return Placement("default", "kernel or products, measured")
    capability = library.capability(x.device)
    if any(heuristics.runs_well(kind, family, sizes, capability) for family, sizes in found.items()):
        return Placement("default", "kernel")
    return _declined("torch's products are as fast")


def place_gated_mlp(given: Sequence[object], training: bool, settings: Settings) -> Placement:
    """Whole in training where the kernels are faster by stored measurements: nothing competes with the forward's.

    The setting `mlp_memory` says what lives until the backward.
    """
    x = given[0]
    assert isinstance(x, Tensor)
    if not training:
        return _declined("without gradients its parts are enough")
    if settings.kernels == "never":
        return _declined("kernels are off")
    if reason := library.missing(x.device):
        return _declined(reason)
    _, weights, biases, order, down_weight, _, *flags = linear_kernels.with_defaults("gated_mlp", given)
    found, reason = linear_kernels.families("linear_swiglu", (x, weights, biases, order, *flags))
    if "gated" not in found:
        return _declined(reason or "no kernel")
    if down_weight.dtype != x.dtype:
        return _declined(f"no kernel for {x.dtype} beside {down_weight.dtype}")
    if settings.kernels != "always" and not heuristics.trains(found["gated"], library.capability(x.device)):
        return _declined("torch's products are as fast")
    overload = "recompute" if settings.mlp_memory == "recompute" else "default"
    return Placement(overload, "kernels, forwards and backwards")


def _cannot_run(training: bool, settings: Settings) -> str:
    if training:
        return "no kernel with gradients"
    return "kernels are off" if settings.kernels == "never" else ""


def _declined(reason: str) -> Placement:
    return Placement("", "", declined=reason)
