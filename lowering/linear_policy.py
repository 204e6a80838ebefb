"""Which form the rewrite emits for linears with a norm, a gate or a residual around them.

See infuse.lowering.policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from infuse.lowering.heuristics import linears as heuristics
from infuse.ops import library, linear_kernels
from infuse.ops.swiglu import NUM_FLAGS
from infuse.report import Placement
from infuse.settings import Settings

KINDS = tuple(linear_kernels.KINDS)


def place_linears(
    kind: str, given: Sequence[object], training: bool, settings: Settings, max_autotune: bool
) -> Placement:
    """The operator where a kernel may run; elsewhere its parts stay sites of their own."""
    x = given[0]
    assert isinstance(x, Tensor)
    if reason := _cannot_run(x, settings):
        return _declined(reason)
    if training:
        return _declined("no kernel with gradients")
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


def place_packed(given: Sequence[object], training: bool) -> Placement:
    """One product over weights that are packed in place, where that is faster by stored measurements."""
    x = given[0]
    assert isinstance(x, Tensor)
    rows = x.shape[:-1].numel()
    if training or x.device.type != "cuda":
        return _declined("no faster in training" if training else f"not measured on {x.device.type}")
    if isinstance(rows, int) and heuristics.packs_well(rows, library.capability(x.device)):
        return Placement("parts", "one product, the weights packed in place")
    return _declined("separate products are as fast")


def place_gated_mlp(given: Sequence[object], training: bool, settings: Settings) -> Placement:
    """Whole in training where the kernels are faster by stored measurements: nothing competes with the forward's.

    The setting `mlp_memory` says what lives until the backward.
    """
    x = given[0]
    assert isinstance(x, Tensor)
    if reason := _cannot_run(x, settings):
        return _declined(reason)
    if not training:
        return _declined("without gradients its parts are enough")
    _, weights, biases, order, down_weight, _, *flags = linear_kernels.with_defaults("gated_mlp", given)
    found, reason = linear_kernels.families("linear_swiglu", (x, weights, biases, order, *flags[:NUM_FLAGS]))
    if "gated" not in found:
        return _declined(reason or "no kernel")
    if down_weight.dtype != x.dtype:
        return _declined(f"no kernel for {x.dtype} beside {down_weight.dtype}")
    if settings.kernels != "always" and not heuristics.trains(found["gated"], library.capability(x.device)):
        return _declined("torch's products are as fast")
    overload = "recompute" if settings.mlp_memory == "recompute" else "default"
    return Placement(overload, "kernels, forwards and backwards")


def _cannot_run(x: Tensor, settings: Settings) -> str:
    if settings.kernels == "never":
        return "kernels are off"
    if settings.numerics == "exact":
        return "the kernels round less often than the source, and numerics is exact"
    return library.missing(x.device)


def _declined(reason: str) -> Placement:
    return Placement("", "", declined=reason)
