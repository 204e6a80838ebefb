"""RMSNorm as models spell it: each function of x [.., D] and w [D] is one site."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

D = 16
Function = Callable[[Tensor, Tensor], Tensor]


def hugging_face(x: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + 1e-6)
    return w * h.to(x.dtype)


def hugging_face_weight_on_the_right(x: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h.to(x.dtype) * w


def cast_last(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (w * h).to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + w.float())).type_as(x)


def torchtune(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (D,), weight=w, eps=1e-6).to(x.dtype)


def called_by_name(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, [D], w, 1e-6)


def called_by_name_in_torch(x: Tensor, w: Tensor) -> Tensor:
    return torch.rms_norm(x, (D,), weight=w, eps=1e-6)


def called_without_eps(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x * 1e-3, (D,), w)


def called_without_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), eps=1e-6)


def called_then_weighted(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), eps=1e-6) * w


def two_separate_casts(x: Tensor, w: Tensor) -> Tensor:
    r = torch.rsqrt((x.float() ** 2).mean(-1, keepdim=True) + 1e-6)
    return w * (x.float() * r).type_as(x)


def x_times_x(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * (h * h).mean(dim=-1, keepdim=True).add(1e-6).rsqrt()).to(x) * w


def torch_square(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(torch.mean(torch.square(h), (-1,), True) + 1e-6)).to(x.dtype) * w


def two_float_casts_in_the_square(x: Tensor, w: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def without_weight(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def without_eps(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))).to(x.dtype) * w


def offset_in_the_weights_dtype(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (1 + w) * h.to(x.dtype)


def unsqueeze_in_place_of_keepdim(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1) + 1e-6).unsqueeze(-1)).to(x.dtype) * w


def narrow_x_beside_a_wide_statistic(x: Tensor, w: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def weight_of_three_dimensions(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w[None, None]


def dropout_that_drops_nothing(x: Tensor, w: Tensor) -> Tensor:
    h = F.dropout(x, 0.0).float()
    return w * F.dropout(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6), 0.5, training=False).to(x.dtype)


def eps_in_float64(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def root_and_quotient(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def reciprocal_of_the_root(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * (1.0 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype) * w


def reciprocal_method(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * (h.square().mean(-1, keepdim=True) + 1e-6).sqrt().reciprocal()).to(x.dtype)


def power_of_minus_one_half(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5)).to(x.dtype)


def power_of_one_half(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h / (h.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5).to(x.dtype)


def sum_and_size(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6)).to(x.dtype)


def eps_added_in_place_of_order(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(1e-6 + h.pow(2).mean(-1, keepdim=True))).to(x.dtype)


def eps_as_a_constant_tensor(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + torch.tensor(1e-6))).to(x.dtype)


def clamped(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp(min=1e-6))).to(x.dtype)


def clamped_at_most(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * h.pow(2).mean(-1, keepdim=True).clamp_min(0.5).rsqrt()).to(x.dtype) * w


def maximum(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(torch.maximum(h.pow(2).mean(-1, keepdim=True), torch.tensor(0.7)))).to(x.dtype)


def maximum_of_a_full_tensor(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    mean = torch.mean(h * h, dim=-1, keepdim=True)
    return (h / torch.maximum(mean, torch.full_like(mean, 0.6)).sqrt() * w).to(x.dtype)


def clamped_root(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h / h.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=0.8)).to(x.dtype) * w


def weight_multiplied_first(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (w * h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def weight_multiplied_last_of_three(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * w.float() * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def squared_l2_norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.norm(2, -1, keepdim=True) ** 2 / D + 1e-6)).to(x.dtype)


def l2_norm_over_root_of_size(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h / (torch.norm(h, dim=-1, keepdim=True) * D**-0.5)).to(x.dtype)


def l2_norm_clamped(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    norm = torch.norm(h, p=2, dim=-1, keepdim=True) / 4.0
    return (h / norm.clamp(min=0.9) * w).to(x.dtype)


def l2_norm_clamped_first(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp(min=4.0)
    return (w * (h / norm * 4.0)).to(x.dtype)


def normalize_times_root_of_size(x: Tensor, w: Tensor) -> Tensor:
    return (F.normalize(x.float(), dim=-1) * 4.0 * w).to(x.dtype)


def weight_before_root_of_size(x: Tensor, w: Tensor) -> Tensor:
    return (F.normalize(x.float(), p=2.0, dim=-1, eps=3.0) * (w + 1) * math.sqrt(D)).to(x.dtype)


def olmo_without_weight_in_its_own_dtype(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], None, 1e-5).type_as(x) * w


# Those whose size n has to be a number: n ** 0.5 of a symbolic one is not known.
STATIC = (
    squared_l2_norm,
    l2_norm_over_root_of_size,
    l2_norm_clamped,
    l2_norm_clamped_first,
    normalize_times_root_of_size,
    weight_before_root_of_size,
)
SPELLINGS = (
    root_and_quotient,
    reciprocal_of_the_root,
    reciprocal_method,
    power_of_minus_one_half,
    power_of_one_half,
    sum_and_size,
    eps_added_in_place_of_order,
    eps_as_a_constant_tensor,
    clamped,
    clamped_at_most,
    maximum,
    maximum_of_a_full_tensor,
    clamped_root,
    weight_multiplied_first,
    weight_multiplied_last_of_three,
    olmo_without_weight_in_its_own_dtype,
    *STATIC,
    hugging_face,
    hugging_face_weight_on_the_right,
    cast_last,
    gemma,
    torchtune,
    called_by_name,
    called_by_name_in_torch,
    called_without_eps,
    called_without_weight,
    called_then_weighted,
    two_separate_casts,
    x_times_x,
    torch_square,
    two_float_casts_in_the_square,
    without_weight,
    without_eps,
    offset_in_the_weights_dtype,
    unsqueeze_in_place_of_keepdim,
    narrow_x_beside_a_wide_statistic,
    weight_of_three_dimensions,
    dropout_that_drops_nothing,
)


def tensors(dtype: torch.dtype = torch.float32, training: bool = False, weight: object = None) -> tuple[Tensor, Tensor]:
    """x [2, 3, D] and w [D]"""
    w = torch.randn(D) * 0.3 + 1
    x = torch.randn(2, 3, D).to(dtype)
    wide = weight if isinstance(weight, torch.dtype) else dtype
    return x.requires_grad_(training), w.to(wide).requires_grad_(training)
