"""Others' attention kernels as formulas: SDPA's backends, the operators behind them that training needs, and
FlashAttention-3 (Shah et al. 2024) where the user has it installed.

They are contestants of Infuse's kernels, and what stands in the graph where those lose. The operators of training
exchange out and the log-sum-exp with Infuse's, so that a forward pass by one may be followed by a backward pass by
another.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from infuse.lowering import cudnn_attention, inductor
from infuse.ops import attention as op
from infuse.ops import library
from infuse.ops.attention_operands import DTYPES

DEFAULT = "sdpa"
FLASH_3 = "flash_attention_3"
_FLASH_3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")  # the wheel of forward kernels, and the project's own
_BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_aten = torch.ops.aten


def _with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def formula(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        softcap: float,
        sinks: Tensor | None,
        masked_rows: str,
        *_: object,
    ) -> Tensor:
        with sdpa_kernel(backend):
            return op.heads_inside(op.attention_sdpa(q, k, v, mask, scale, is_causal, masked_rows))

    return formula


def default(*args: Any) -> Tensor:
    """What stands in the graph without Infuse: torch's choice of backend, or the formula where SDPA has none."""
    return op.heads_inside(op.attention_inline(*args))


def inference(args: tuple[Any, ...]) -> dict[str, Callable[..., Tensor]]:
    """SDPA as torch picks its backend, and each other backend that takes these arguments, without repetitions.

    args: IR nodes and numbers, those of infuse::attention. SDPA computes neither a softcap nor sinks.
    """
    found: dict[str, Callable[..., Tensor]] = {DEFAULT: default}
    if flash_3_takes(args):
        found[FLASH_3] = _flash_3
    seen = {inductor.code_of(default, args)}
    softcap, sinks = args[6:8]
    if softcap != 0.0 or sinks is not None:
        return found
    for label, backend in _BACKENDS.items():
        formula = _with_backend(backend)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says at length why a backend cannot run
                code = inductor.code_of(formula, args)
        except RuntimeError:
            continue  # "No available kernel": this backend does not take such shapes, dtypes or masks
        if code not in seen:
            seen.add(code)
            found[label] = formula
    return found


def formula_of(label: str) -> Callable[..., Tensor]:
    """The formula that `inference` calls `label`."""
    if label == FLASH_3:
        return _flash_3
    return default if label == DEFAULT else _with_backend(_BACKENDS[label])


@functools.cache
def flash_3_module() -> ModuleType | None:
    """FlashAttention-3's Python interface, None where it is not installed."""
    for name in _FLASH_3_MODULES:
        try:
            return importlib.import_module(name)
        except Exception:  # built for another torch or CUDA, it fails in ways of its own
            continue
    return None


def flash_3_takes(args: tuple[Any, ...]) -> bool:
    """Whether FlashAttention-3 computes the same: no mask, no sinks, and a diagonal where torch has it."""
    q, k, v, mask, scale, is_causal, softcap, sinks, _, dropout_p, _ = args
    if mask is not None or sinks is not None or dropout_p != 0.0 or not isinstance(scale, float):
        return False
    if library.capability(q.get_device()) != (9, 0) or q.get_dtype() not in DTYPES or not isinstance(softcap, float):
        return False
    (*_, queries, dim), keys, dim_v = q.get_size(), k.get_size()[2], v.get_size()[3]
    return (not is_causal or queries == keys) and dim == dim_v and dim <= 256 and flash_3_module() is not None


def _flash_3(
    q: Tensor, k: Tensor, v: Tensor, mask: None, scale: float, is_causal: bool, softcap: float, *_: object
) -> Tensor:
    module = flash_3_module()
    assert module is not None
    inside = (tensor.transpose(1, 2) for tensor in (q, k, v))
    found = module.flash_attn_func(*inside, softmax_scale=scale, causal=is_causal, softcap=softcap)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, *_: Any) -> Any:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    return out, lse


def _without_dropout(q: Tensor, k: Tensor, is_causal: bool) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    """What torch's operators for gradients take of sizes and flags, and of the random state."""
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    return (None, None, q.shape[2], k.shape[2], 0.0, is_causal), (unused, unused)


def _flash_backward(*args: Any) -> Any:
    dout, q, k, v, out, lse, _, scale, is_causal = args[:9]
    sizes, state = _without_dropout(q, k, is_causal)
    given = (dout, q, k, v, out, lse, *sizes, *state)
    return _aten._scaled_dot_product_flash_attention_backward(*given, scale=scale)


def _cudnn_bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as torch's operators for cuDNN take it: numbers in q's dtype, [B, H, S, T]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf"))
    return mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, *_: Any) -> Any:
    bias = _cudnn_bias(q, k, mask)
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, is_causal, False, scale=scale)
    return out, lse.squeeze(-1)


def _cudnn_backward(*args: Any) -> Any:
    dout, q, k, v, out, lse, mask, scale, is_causal = args[:9]
    sizes, state = _without_dropout(q, k, is_causal)
    given = (dout, q, k, v, out, lse.unsqueeze(-1), *state, _cudnn_bias(q, k, mask), *sizes)
    return cudnn_attention.WITH_OWN_KEY(*given, scale=scale)


# Those that training calls, both passes. They take the first arguments of infuse::attention_fwd and attention_bwd.
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sdpa_cudnn": (_cudnn_forward, _cudnn_backward),
    "sdpa_flash": (_flash_forward, _flash_backward),
}
_CAN_USE = {"sdpa_cudnn": can_use_cudnn_attention, "sdpa_flash": can_use_flash_attention}


def forward(args: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """torch's kernels for out and the log-sum-exp. args: those of infuse::attention; {} where none computes it."""
    return {label: OPERATORS[label][0] for label in _takers(args)}


def backward(args: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """torch's kernels for dq, dk and dv. args: those of infuse::attention; {} where none computes it."""
    return {label: OPERATORS[label][1] for label in _takers(args)}


def _takers(args: tuple[Any, ...]) -> list[str]:
    q, k, v, mask, _, is_causal, softcap, sinks, masked_rows, dropout_p, _ = args
    if q.get_device().type != "cuda":
        return []
    if softcap != 0.0 or sinks is not None or dropout_p != 0.0 or masked_rows not in ("zeros", "none"):
        return []
    with inductor.fake_mode():
        q, k, v = (inductor.example(node) for node in (q, k, v))
        mask = None if mask is None else inductor.example(mask)
        # cuDNN would round a mask of float32 to q's dtype.
        if mask is not None and mask.dtype not in (torch.bool, q.dtype):
            return []
        params = SDPAParams(q, k, v, _cudnn_bias(q, k, mask), 0.0, is_causal, q.shape[1] != k.shape[1])
        return [label for label in OPERATORS if _CAN_USE[label](params)]
