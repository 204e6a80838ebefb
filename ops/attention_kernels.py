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
from infuse.ops.attention_operands import DTYPES as DTYPES
from infuse.ops.attention_operands import cannot_take, readable
from infuse.ops.registration import define

# The operators that the kernels serve.
OPERATORS = ("attention",)
MAX_ROWS = 64  # queries times heads that share K and V
MAX_KEYS = 1 << 20
DECODE, FORWARD = "attention_decode", "attention_forward"  # names of the tables of configurations
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
    if dropout_p != 0.0:
        return "no kernel for dropout"
    if reason := _cannot_have_rows(q, k):
        return reason
    return cannot_take(q, k, v, mask, (scale, softcap), sinks, masked_rows, most_of_small=128)


def can_forward(
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
    """Why the kernel for many query rows cannot compute this, "" when it can; as can_decode."""
    return cannot_take(q, k, v, mask, (scale, softcap, dropout_p), sinks, masked_rows, most_of_small=192)


def _cannot_have_rows(q: Tensor, k: Tensor) -> str:
    _, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    if not all(isinstance(size, int) for size in (heads, queries, kv_heads)):
        return "the number of heads or of queries is symbolic"
    if queries * heads // kv_heads > MAX_ROWS:
        return f"no kernel for {queries} queries of {heads // kv_heads} heads that share K and V"
    return "no kernel for so many keys" if isinstance(keys, int) and keys > MAX_KEYS else ""


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
    """`out` [B, H, S, Dv], written by the kernel; see infuse.ops.attention for the arguments."""
    q, k, v = (readable(tensor) for tensor in (q, k, v))
    nan = masked_rows in ("nan", "softmax")
    torch.ops.infuse.attention_decode_out(q, k, v, mask, scale, is_causal, softcap, sinks, nan, config, splits, out)
    return out


def tile_map(mask: Tensor, queries: int, keys: int) -> Tensor:
    """What the mask does to each tile, uint8 [Bm, Hm, ceil(queries / 64), ceil(keys / 64)]; see attention_tile_map."""
    return torch.ops.infuse.attention_tile_map(mask, queries, keys)  # type: ignore[no-any-return]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tile_map: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    masked_rows: str = "zeros",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: int = -1,
    splits: int = 0,
) -> Tensor:
    """`out` [B, H, S, Dv] and `lse` [B, H, S], if it is given, written by the kernel for many query rows."""
    q, k, v = (readable(tensor) for tensor in (q, k, v))
    nan = masked_rows in ("nan", "softmax")
    flags = (scale, is_causal, softcap, sinks, nan, dropout_p, seed, config, splits)
    torch.ops.infuse.attention_forward_out(q, k, v, mask, tile_map, *flags, out, lse)
    return out
