"""Spellings that few authors use: recognised where it is sound, otherwise refused by name and never passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.capture import MODES, Captured, assert_same_results, capture

EPS = 1e-6


def inputs(count: int, *shape: int, dtype: torch.dtype = torch.float32, training: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    return [tensor.requires_grad_(training) for tensor in tensors]


def silu_by_exponential(a: Tensor, b: Tensor) -> Tensor:
    return a / (1 + torch.exp(-a)) * b


def silu_by_exponential_last(a: Tensor, b: Tensor) -> Tensor:
    return b * (a / (torch.exp(a * -1.0) + 1.0))


def exponential_of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * 0.5, dim=-1).exp() @ v


def squares_by_einsum(x: Tensor, y: Tensor) -> Tensor:
    h, w = x.float(), y[0, 0, 0]
    mean = torch.einsum("...d,...d->...", h, h)[..., None] / h.shape[-1]
    return (h * torch.rsqrt(mean + EPS)).to(x.dtype) * w


def weight_times_root_layer(x: Tensor, y: Tensor) -> Tensor:
    h, w = x.float(), y[0, 0, 0].float()
    centred = h - h.mean(-1, keepdim=True)
    return (centred * (w * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt())).to(x.dtype)


def weight_times_root_rms(x: Tensor, y: Tensor) -> Tensor:
    h, w = x.float(), y[0, 0, 0].float()
    return (h * (torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * w)).to(x.dtype)


FUSED: list[tuple[Callable[..., Tensor], int, str]] = [
    (silu_by_exponential, 2, "swiglu"),
    (silu_by_exponential_last, 2, "swiglu"),
    (exponential_of_log_softmax, 3, "attention"),
    (squares_by_einsum, 2, "rms_norm"),
    (weight_times_root_layer, 2, "layer_norm"),
    (weight_times_root_rms, 2, "rms_norm"),
]


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(("function", "count", "kind"), FUSED)
def test_it_is_recognised(
    function: Callable[..., Tensor], count: int, kind: str, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    tensors = inputs(count, 2, 3, 6, 8, dtype=dtype, training=training)
    captured = capture(function, *tensors, dynamic=dynamic and kind != "rms_norm", training=training)
    assert captured.counts == {kind: 1}, captured.refusals
    assert_same_results(captured, training)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a / (1 + torch.exp(a)) * b,
        lambda a, b: a / (2 + torch.exp(-a)) * b,
        lambda a, b: a / (1 - torch.exp(-a)) * b,
        lambda a, b: b / (1 + torch.exp(-a)) * b,
        lambda a, b: a / (1 + torch.exp(-b)) * b,
        lambda a, b: (1 + torch.exp(-a)) / a * b,
        lambda a, b: F.log_softmax(a @ b.mT, dim=-1) @ b,
        lambda a, b: F.log_softmax(a @ b.mT, dim=-2).exp() @ b,
        lambda a, b: a * torch.rsqrt(torch.einsum("...d,...d->...", a, b)[..., None].abs() / 8 + EPS),
        lambda a, b: a * torch.rsqrt(torch.einsum("...d,...d->...", a, a)[..., None] / 7 + EPS),
        lambda a, b: a * torch.rsqrt(torch.einsum("abcd,abcd->abd", a, a)[:, :, None] / 6 + EPS),
        lambda a, b: a * (torch.rsqrt(a.square().mean(-1, keepdim=True) + EPS) * b),
        lambda a, b: a.abs() * (b[0, 0, 0] * torch.rsqrt(a.square().mean(-1, keepdim=True) + EPS)),
    ],
)
def test_near_miss_stays_as_it_is(function: Callable[..., Any]) -> None:
    captured = capture(function, *inputs(2, 2, 3, 6, 8))
    assert not {"swiglu", "attention", "layer_norm"} & set(captured.counts)
    assert_same_results(captured)


def refused(captured: Captured, kind: str, words: str) -> None:
    assert captured.counts.get(kind, 0) == 0
    (record,) = [record for record in captured.records if record.kind == kind]
    assert record.status == "refused" and words in record.reason and record.remedy


def test_softmaxes_that_divide_late_or_by_more_are_refused() -> None:
    def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return (weights @ v) / weights.sum(-1, keepdim=True)

    def by_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(q @ k.mT)
        return weights / (1 + weights.sum(-1, keepdim=True)) @ v

    refused(capture(late, *inputs(3, 2, 3, 6, 8)), "attention", "divided by the sum")
    refused(capture(by_more, *inputs(3, 2, 3, 6, 8)), "attention", "added to the sum")


def test_exponentials_of_no_product_are_nobodys() -> None:
    captured = capture(lambda x, v: torch.exp(x) @ v / torch.exp(x).sum(-1, keepdim=True), *inputs(2, 6, 6))
    assert captured.records == []


def test_rotations_that_are_written_or_rolled_are_refused() -> None:
    def written(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin, out = angles[..., :4].cos(), angles[..., :4].sin(), torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    def rolled(x: Tensor, angles: Tensor) -> Tensor:
        signs = torch.cat((-torch.ones(4), torch.ones(4)))
        return x * angles.cos() + torch.roll(x, 4, dims=-1) * signs * angles.sin()

    refused(capture(written, *inputs(2, 2, 3, 6, 8)), "rope", "written into slices")
    refused(capture(rolled, *inputs(2, 2, 3, 6, 8)), "rope", "roll and signs")


def test_windows_that_are_rolled_are_no_rotations() -> None:
    captured = capture(lambda x, y: torch.roll(x, 4, dims=-1) * y + x.sin() * y, *inputs(2, 2, 3, 6, 8))
    assert captured.records == []
