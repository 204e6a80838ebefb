"""The CUDA kernels of csrc/rope as operators that write into tensors they are given, and what these take.

rope_out rotates x, and `other` too if there is one (q and k in one launch), after an RMSNorm of each row if eps is not
None. is_backward: the transpose of the rotation, which is its gradient.

rope_cache_write_out also writes k and v into caches: k_cache[:, :, k_positions] = rope(k), v_cache[:, :, v_positions] =
v. q, k, v [batch, heads, seq_len, D]; caches [batch, kv_heads, cache_len, D]; positions [seq_len] or [batch, seq_len].

config: -1 lets the launcher choose, otherwise an index into its table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops import library
from infuse.ops.registration import define

NAME = "rope"  # of the table of configurations
_NORM = "float? eps, float weight_offset, bool cast_before_weight"
_FLAGS = "bool interleaved, bool per_pair, bool inverse, bool upcast"
define(
    "rope_out(Tensor x, Tensor? other, Tensor cos, Tensor sin, Tensor? weight, Tensor? other_weight, "
    f"{_NORM}, {_FLAGS}, bool is_backward, int config, Tensor(a!) out, Tensor(b!)? other_out) -> ()"
)
define(
    "rope_cache_write_out(Tensor q, Tensor k, Tensor v, Tensor q_cos, Tensor q_sin, Tensor k_cos, Tensor k_sin, "
    f"Tensor k_positions, Tensor v_positions, Tensor? q_weight, Tensor? k_weight, {_NORM}, {_FLAGS}, int config, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) out) -> ()"
)

# The operators that the kernels serve.
OPERATORS = ("rope", "rope_bwd", "qk_norm_rope", "qk_norm_rope_bwd", "rope_cache_write")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_DIMS = 4  # of a tensor that is rotated: two besides the heads and the last


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> str:
    """Why the kernel cannot rotate x, "" when it can. Reads shapes, strides and dtypes only."""
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if tensor.dtype not in DTYPES:
            return f"no kernel for {name} in {tensor.dtype}"
    if x.dim() > _MAX_DIMS:
        return f"no kernel for {x.dim()} dimensions"
    if x.dim() == _MAX_DIMS and not any(is_shared(cos, x, dim) and is_shared(sin, x, dim) for dim in range(3)):
        return "no kernel for factors of each head"
    return "" if has_adjacent_elements(x) else f"no kernel for a last dimension of stride {x.stride(-1)}"


# Sizes and strides may be symbolic: nothing is asked of those, so that no guard is added.


def is_shared(table: Tensor, x: Tensor, dim: int) -> bool:
    """Whether all of x's rows along a dimension meet the same factors."""
    own = dim - (x.dim() - table.dim())
    return own < 0 or _is_number(table.shape[own], 1) or _is_number(table.stride(own), 0)


def has_adjacent_elements(x: Tensor) -> bool:
    """Whether the elements of a row lie side by side."""
    return _is_number(x.stride(-1), 1) or _is_number(x.shape[-1], 1)


def _is_number(value: object, number: int) -> bool:
    return isinstance(value, int) and value == number


def can_normalise(x: Tensor, weight: Tensor | None, cast_before_weight: bool) -> str:
    """Why the kernel cannot normalise x before it rotates it, "" when it can."""
    if weight is None:
        return ""
    if weight.dtype not in (x.dtype, torch.float32):
        return f"no kernel for a weight in {weight.dtype} beside x in {x.dtype}"
    if cast_before_weight and weight.dtype != x.dtype:
        return f"no kernel for a cast before a weight in {weight.dtype}"
    if not has_adjacent_elements(weight):
        return f"no kernel for a weight of stride {weight.stride(0)}"
    return ""


def missing(x: Tensor) -> str:
    """Why there are no kernels for x's device, "" when there are."""
    return library.missing(x.device)
