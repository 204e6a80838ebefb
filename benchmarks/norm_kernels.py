"""The norms' kernels without a compiler around them, and Liger's, as implementations of the benchmark's cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Function, Impl, Unavailable
from implementations import optional
from norm_functions import EPS, heads
from torch import Tensor

Launch = Callable[..., Any]


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.infuse.rms_norm_out(x, weight, EPS, 0.0, True, False, -1, out)
    return out


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.ops.infuse.layer_norm_out(x, weight, bias, EPS, 0.0, False, -1, out)
    return out


def _add_rms(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return torch.ops.infuse.add_rms_norm_kernel(x, residual, weight, EPS, 0.0, True, False, -1)


def _add_layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return torch.ops.infuse.add_layer_norm_kernel(x, residual, weight, bias, EPS, 0.0, False, -1)


def _gated(before: bool) -> Launch:
    def norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.infuse.gated_rms_norm_out(x, gate, weight, EPS, before, True, 1, False, False, -1, out)
        return out

    return norm


def _qk(packed: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    q, k = heads(packed, q_weight, 32, 8)
    return _rms(q, q_weight), _rms(k, k_weight)


_KERNELS: dict[str, Launch] = {
    "rms_norm": _rms,
    "layer_norm": _layer,
    "add + rms_norm": _add_rms,
    "add + layer_norm": _add_layer,
    "gate, rms_norm": _gated(False),
    "rms_norm, gate": _gated(True),
    "q/k norm": _qk,
}


def _liger_rms() -> Function:
    function = optional("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda x, weight: function.apply(x, weight, EPS, 0.0, "llama", False)


def _liger_layer() -> Function:
    function = optional("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, weight, bias: function.apply(x, weight, bias, EPS)


def _liger_add() -> Function:
    function = optional("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return lambda x, residual, weight: function.apply(x, residual, weight, EPS, 0.0, "llama", False)


_LIGER = {"rms_norm": _liger_rms, "layer_norm": _liger_layer, "add + rms_norm": _liger_add}


def kernels(kind: str) -> list[Impl]:
    """What runs `kind` on a GPU by a kernel of somebody's own."""

    def prepare() -> Function:
        missing = optional("infuse.ops.library").missing(torch.device("cuda"))
        if missing:
            raise Unavailable(missing)
        for op in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "gated_rms_norm"):
            optional(f"infuse.ops.{op}")
        return _KERNELS[kind]

    impls = [Impl("infuse-kernel", prepare, note="the launcher's choice of configuration, not compiled")]
    return impls + ([Impl("liger", _LIGER[kind])] if kind in _LIGER else [])
