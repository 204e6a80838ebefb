"""Scaled dot product attention with grouped K/V heads (Vaswani et al. 2017; Ainslie et al. 2023, GQA).

    out = softmax(scale * q k^T + mask) v        q head h reads K/V head h // (H / H_kv)

Shapes: q [B, H, S, D]; k [B, H_kv, T, D]; v [B, H_kv, T, Dv]; mask broadcastable to [B, H, S, T]; out [B, H, S, Dv];
lse [B, H, S], float32 (float64 for a float64 q). out and the gradients lie in memory as [B, S, H, D], so that the
transpose and reshape that joins the heads again copies nothing.
Dtypes: q, k, v one float dtype, out the same; mask bool (True attends) or float (added to scores); softmax in float32.
is_causal: query i reads keys 0..i, aligned at the upper left as in torch; exclusive with mask. A row that attends to
nothing gives zeros. No dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops import checks
from infuse.ops.registration import Placements, differentiate, register, register_differentiable, register_sharding

ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal=False"


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    checks.floating(op, "q", q)
    checks.same_dtype(op, q=q, k=k, v=v)
    checks.rank(op, "q", q, 4, "[B, H, S, D]")
    checks.rank(op, "k", k, 4, "[B, H_kv, T, D]")
    checks.rank(op, "v", v, 4, "[B, H_kv, T, Dv]")
    checks.equal(op, "k: batch", k.shape[0], q.shape[0])
    checks.equal(op, "v: batch", v.shape[0], q.shape[0])
    checks.equal(op, "k: head_dim", k.shape[3], q.shape[3])
    checks.equal(op, "v: heads", v.shape[1], k.shape[1])
    checks.equal(op, "v: length", v.shape[2], k.shape[2])
    checks.equal(op, "q: heads modulo K/V heads", q.shape[1] % k.shape[1], 0)
    if mask is None:
        return
    if is_causal:
        raise ValueError(f"infuse::{op}: got a mask and is_causal=True, expected one of them")
    if mask.dtype != torch.bool:
        checks.floating(op, "mask", mask)
    if mask.dim() > 4:
        raise ValueError(
            f"infuse::{op}: mask: got shape {tuple(mask.shape)}, expected one that broadcasts to [B, H, S, T]"
        )


def heads_inside(tensor: Tensor) -> Tensor:
    """[B, H, S, D] in the memory layout [B, S, H, D]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_heads_inside(like: Tensor, head_dim: int | torch.SymInt) -> Tensor:
    batch, heads, length, _ = like.shape
    return like.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def expand_kv(kv: Tensor, num_heads: int) -> Tensor:
    """[B, H_kv, T, D] -> [B, H, T, D], each head repeated for its group of q heads."""
    batch, num_kv_heads, length, head_dim = kv.shape
    group = num_heads // num_kv_heads
    expanded = kv[:, :, None].expand(batch, num_kv_heads, group, length, head_dim)
    return expanded.reshape(batch, num_heads, length, head_dim)


def _has_groups(q: Tensor, k: Tensor) -> bool:
    return not (isinstance(q.shape[1], int) and isinstance(k.shape[1], int) and q.shape[1] == k.shape[1])


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """scale * q k^T + mask [B, H, S, T] in float32 (float64 for float64); k has q's heads."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(-2, -1)) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(dtype)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), zero in rows that attend to nothing (lse is -inf there)."""
    nothing = (lse == float("-inf")).unsqueeze(-1)
    return torch.where(nothing, 0.0, torch.exp(scores - lse.unsqueeze(-1)))


def attention_fwd_ref(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """out and the log-sum-exp of the scores, by the formula: the test oracle."""
    _check("attention_fwd", q, k, v, mask, is_causal)
    num_heads = q.shape[1]
    scores = _scores(q, expand_kv(k, num_heads), mask, scale, is_causal)
    lse = torch.logsumexp(scores, -1)
    out = torch.matmul(_probabilities(scores, lse), expand_kv(v, num_heads).to(scores.dtype))
    return heads_inside(out.to(q.dtype)), lse


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    """out by the formula."""
    return attention_fwd_ref(q, k, v, mask, scale, is_causal)[0]


def _native_groups(q: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's SDPA has a fused kernel that reads grouped K/V heads as they are.

    Flash takes them without a mask, cuDNN (sm_90 and later) also with one; elsewhere torch falls to the plain formula.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(q.device) >= ((8, 0) if mask is None else (9, 0))


def _mask_for_sdpa(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as SDPA takes it: at least two dimensions, and not narrower than q, which loses nothing."""
    if mask.dim() < 2:
        mask = mask.reshape(1, -1)
    if mask.dtype != torch.bool and torch.promote_types(mask.dtype, dtype) == dtype:
        mask = mask.to(dtype)
    return mask


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    """out by torch's scaled_dot_product_attention: the decomposition and the fallback."""
    _check("attention", q, k, v, mask, is_causal)
    if mask is not None:
        mask = _mask_for_sdpa(mask, q.dtype)
        if q.is_cuda and mask.dtype not in (torch.bool, q.dtype):
            # CUDA's SDPA would round the mask to q's dtype, which the formula does not.
            return attention_ref(q, k, v, mask, scale, is_causal)
    groups = _has_groups(q, k)
    if groups and not _native_groups(q, mask):
        k, v, groups = expand_kv(k, q.shape[1]), expand_kv(v, q.shape[1]), False
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=groups)


def attention_bwd_ref(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    needs_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dmask in the shapes and dtypes of q, k, v and mask (dmask is empty [0] unless needed)."""
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    scores = _scores(q, expand_kv(k, num_heads), mask, scale, is_causal)
    dtype = scores.dtype
    probabilities = _probabilities(scores, lse)
    d = dout.to(dtype)
    dv = torch.matmul(probabilities.transpose(-2, -1), d)
    dprobabilities = torch.matmul(d, expand_kv(v, num_heads).to(dtype).transpose(-2, -1))
    delta = (d * out.to(dtype)).sum(-1, keepdim=True)
    dscores = probabilities * (dprobabilities - delta)
    dq = torch.matmul(dscores, expand_kv(k, num_heads).to(dtype)) * scale
    dk = torch.matmul(dscores.transpose(-2, -1), q.to(dtype)) * scale

    def sum_groups(expanded: Tensor) -> Tensor:
        grouped: Tensor = expanded.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
        return grouped.sum(2)

    dmask = q.new_empty(0)
    if needs_dmask and mask is not None:
        dmask = dscores.sum_to_size(mask.shape).to(mask.dtype).contiguous()
    return (
        heads_inside(dq.to(q.dtype)),
        heads_inside(sum_groups(dk).to(k.dtype)),
        heads_inside(sum_groups(dv).to(v.dtype)),
        dmask,
    )


def attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    _check("attention", q, k, v, mask, is_causal)
    return _empty_heads_inside(q, v.shape[3])


def attention_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return attention_fake(q, k, v, mask, scale, is_causal), q.new_empty(q.shape[:3], dtype=lse_dtype)


def attention_bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    needs_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = mask.new_empty(mask.shape) if needs_dmask and mask is not None else q.new_empty(0)
    dq, dk, dv = (_empty_heads_inside(tensor, tensor.shape[3]) for tensor in (q, k, v))
    return dq, dk, dv, dmask


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
    ) -> Tensor:
        out, lse = torch.ops.infuse.attention_fwd(q, k, v, mask, scale, is_causal)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.scale, ctx.is_causal = scale, is_causal
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            q, k, v, _, _, mask = ctx.saved_tensors
            return differentiate(attention_ref, (q, k, v, mask, ctx.scale, ctx.is_causal), (dout,))
        needs_dmask = bool(ctx.needs_input_grad[3])
        dq, dk, dv, dmask = torch.ops.infuse.attention_bwd(
            dout, *ctx.saved_tensors, ctx.scale, ctx.is_causal, needs_dmask
        )
        return dq, dk, dv, dmask if needs_dmask else None, None, None


def _implementation(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    return heads_inside(attention_sdpa(q, k, v, mask, scale, is_causal))


def _mask_placement(mask: Any, dim: int) -> Any:
    """A mask is cut along a batch or head dimension that it has, and whole where it broadcasts."""
    from torch.distributed.tensor import Replicate, Shard

    if mask is None:
        return None
    own = dim - (4 - len(mask.shape))
    return Shard(own) if own >= 0 and mask.shape[own] != 1 else Replicate()


def _dims(k: Any) -> list[int]:
    """Batch, and heads where every rank gets whole groups."""
    return [0, 1] if k.shape[1] % k.mesh.size() == 0 else [0]


def _sharding(q: Any, k: Any, v: Any, mask: Any, *flags: Any) -> Placements:
    """Batch and heads, the heads of q, k and v together."""
    return _forward_rules(1, k, mask, flags)


def _fwd_sharding(q: Any, k: Any, v: Any, mask: Any, *flags: Any) -> Placements:
    return _forward_rules(2, k, mask, flags)


def _forward_rules(num_outputs: int, k: Any, mask: Any, flags: tuple[Any, ...]) -> Placements:
    from torch.distributed.tensor import Replicate, Shard

    none = [None for _ in flags]
    whole = [Replicate(), Replicate(), Replicate(), None if mask is None else Replicate(), *none]
    rules: list[tuple[list[Any], list[Any]]] = [([Replicate()] * num_outputs, whole)]
    for dim in _dims(k):
        place = Shard(dim)
        rules.append(([place] * num_outputs, [place, place, place, _mask_placement(mask, dim), *none]))
    return rules


def _bwd_sharding(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, mask: Any, scale: Any, is_causal: Any, needs_dmask: Any
) -> Placements:
    """As the forward; the gradient of a mask that is whole is summed over the ranks."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    flags = [None, None, None]
    whole_mask = None if mask is None else Replicate()
    rules: list[tuple[list[Any], list[Any]]] = [([Replicate()] * 4, [*[Replicate()] * 6, whole_mask, *flags])]
    for dim in _dims(k):
        place, mask_place = Shard(dim), _mask_placement(mask, dim)
        dmask = Replicate() if not needs_dmask else Partial() if mask_place == Replicate() else mask_place
        rules.append(([place, place, place, dmask], [*[place] * 6, mask_place, *flags]))
    return rules


register_differentiable(
    "attention",
    ARGUMENTS,
    "Tensor",
    implementation=_implementation,
    inline=attention_sdpa,
    fake=attention_fake,
    autograd=_Attention.apply,
)
register(
    "attention_fwd",
    "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal",
    "(Tensor, Tensor)",
    implementation=attention_fwd_ref,
    fake=attention_fwd_fake,
)
register(
    "attention_bwd",
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, float scale, bool is_causal,"
    " bool needs_dmask",
    "(Tensor, Tensor, Tensor, Tensor)",
    implementation=attention_bwd_ref,
    fake=attention_bwd_fake,
)
register_sharding("attention", _sharding)
register_sharding("attention_fwd", _fwd_sharding)
register_sharding("attention_bwd", _bwd_sharding)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale * q k^T + mask) v; scale defaults to 1 / sqrt(D). See the module's text for shapes and masks.

    Raises TypeError for dtypes that are no floats or differ, ValueError for shapes that do not fit or a mask with
    is_causal.
    """
    _check("attention", q, k, v, mask, is_causal)
    value = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.infuse.attention(q, k, v, mask, value, is_causal)  # type: ignore[no-any-return]
