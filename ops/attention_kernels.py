"""The CUDA kernels of attention as operators that write into tensors they are given, and what these take.

attention_decode_out: few query rows over many keys, see csrc/attention_decode. Arguments as of infuse::attention; q, k,
v bfloat16 or float16, head dims multiples of 8 up to 256, the last dimension contiguous, every row aligned to 16 bytes;
mask bool, float32 or q's dtype, its last dimension contiguous. nan_for_masked_rows: what a row gives that sees no key,
zeros otherwise.

attention_forward_out: many query rows, see csrc/attention_forward; the same demands. tile_map: what the mask does to
each tile, of attention_tile_map. lse [B, H, S], float32: of the scores and the sink, -inf for a row that sees no key.
seed: int64 [2] on the device, seed and offset of the dropout's random numbers.

config: -1 lets the launcher choose, otherwise an index into its table. splits: of the keys, 0 lets it choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops import attention_tile_map as _tile_map  # noqa: F401, defines its operator
from infuse.ops import library
from infuse.ops.registration import define

# The operators that the kernels serve.
OPERATORS = ("attention",)
DTYPES = (torch.bfloat16, torch.float16)
MAX_ROWS = 64  # queries times heads that share K and V
MAX_KEYS = 1 << 20
_ALIGNMENT = 16
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # 100 KB an SM
NAME = "attention_decode"  # of the table of configurations
define(
    "attention_decode_out(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, float softcap, "
    "Tensor? sinks, bool nan_for_masked_rows, int config, int splits, Tensor(a!) out) -> ()"
)
define(
    "attention_forward_out(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? tile_map, float scale, bool is_causal, "
    "float softcap, Tensor? sinks, bool nan_for_masked_rows, float dropout_p, Tensor? seed, int config, int splits, "
    "Tensor(a!) out, Tensor(b!)? lse) -> ()"
)


def can_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: object,
    softcap: object = 0.0,
    sinks: Tensor | None = None,
    masked_rows: str = "zeros",
    dropout_p: object = 0.0,
) -> str:
    """Why the decode kernel cannot compute this, "" when it can. Reads shapes, strides and dtypes only."""
    if q.dtype not in DTYPES:
        return f"no kernel for {q.dtype}"
    if dropout_p != 0.0:
        return "no kernel for dropout"
    if not all(isinstance(value, (int, float)) for value in (scale, softcap)):
        return "scale or softcap is symbolic"
    if reason := _cannot_have_rows(q, k):
        return reason
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if reason := _cannot_read(name, tensor):
            return reason
    if library.capability(q.device) in _SMALL_SHARED_MEMORY and max(q.shape[-1], v.shape[-1]) > 128:
        return "no kernel for a head_dim above 128 on a device with so little shared memory"
    if sinks is not None and sinks.dtype not in (q.dtype, torch.float32):
        return f"no kernel for sinks in {sinks.dtype}"
    return "" if mask is None else _cannot_mask(q, k, mask, masked_rows)


def _cannot_have_rows(q: Tensor, k: Tensor) -> str:
    _, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    if not all(isinstance(size, int) for size in (heads, queries, kv_heads)):
        return "the number of heads or of queries is symbolic"
    if queries * heads // kv_heads > MAX_ROWS:
        return f"no kernel for {queries} queries of {heads // kv_heads} heads that share K and V"
    return "no kernel for so many keys" if isinstance(keys, int) and keys > MAX_KEYS else ""


def _cannot_read(name: str, tensor: Tensor) -> str:
    head_dim = tensor.shape[-1]
    if not isinstance(head_dim, int) or head_dim % 8 or not 0 < head_dim <= 256:
        return f"no kernel for a head_dim of {head_dim} ({name})"
    if tensor.stride(-1) != 1:
        return f"no kernel for a last dimension of stride {tensor.stride(-1)} ({name})"
    odd = [stride for stride in tensor.stride()[:-1] if isinstance(stride, int) and stride % 8]
    return f"no kernel for rows of {name} that begin {odd[0]} elements apart" if odd else ""


def _cannot_mask(q: Tensor, k: Tensor, mask: Tensor, masked_rows: str) -> str:
    if masked_rows == "mean":
        return "no kernel for the mean of all values in masked rows"
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return f"no kernel for a mask in {mask.dtype}"
    if mask.dim() == 0 or mask.shape[-1] != k.shape[2] or mask.stride(-1) != 1:
        return "no kernel for a mask that is broadcast over keys"
    return ""


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    masked_rows: str = "zeros",
    config: int = -1,
    splits: int = 0,
) -> Tensor:
    """`out` [B, H, S, Dv], written by the kernel; see infuse.ops.attention for the arguments.

    Addresses that are not multiples of 16 bytes cannot be seen while compiling: such tensors are copied first.
    """
    q, k, v = (tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone() for tensor in (q, k, v))
    nan = masked_rows in ("nan", "softmax")
    torch.ops.infuse.attention_decode_out(q, k, v, mask, scale, is_causal, softcap, sinks, nan, config, splits, out)
    return out


def tile_map(mask: Tensor, queries: int, keys: int) -> Tensor:
    """What the mask does to each tile, uint8 [Bm, Hm, ceil(queries / 64), ceil(keys / 64)]; see attention_tile_map."""
    return torch.ops.infuse.attention_tile_map(mask, queries, keys)  # type: ignore[no-any-return]
