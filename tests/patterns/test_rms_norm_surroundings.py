"""RMSNorm beside other things: what stays outside the operator, layouts, results that are read elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import assert_same_results, capture
from tests.patterns.rms_norm_spellings import (
    D,
    Function,
    called_by_name,
    cast_last,
    gemma,
    hugging_face,
    root_and_quotient,
    tensors,
    torchtune,
)


def test_heads_with_a_weight_each_are_normalised_without_it() -> None:
    def cohere(x: Tensor, w: Tensor) -> Tensor:
        h = x.view(2, 3, 2, D // 2)
        h = h.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (w.view(2, D // 2).to(torch.float32) * h).to(x.dtype)

    captured = capture(cohere, *tensors(torch.bfloat16, training=True), training=True)
    assert captured.counts == {"rms_norm": 1}
    assert captured.operators()[0].args[1] is None
    assert_same_results(captured, training=True)


@pytest.mark.parametrize("layout", ["packed", "heads"])
@pytest.mark.parametrize("function", [hugging_face, torchtune, called_by_name, root_and_quotient])
def test_slice_of_a_packed_projection(function: Function, layout: str) -> None:
    def sliced(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if layout == "packed":
            q, k, _ = x.view(2, 3, 3 * D).split([D, D, D], dim=-1)
            return function(q, w), function(k, w)
        q, k = x.view(2, 3, 3, D)[:, :, :2].unbind(2)
        return function(q.transpose(0, 1), w), function(k, w)

    captured = capture(sliced, torch.randn(2, 3, 3 * D).bfloat16(), tensors(torch.bfloat16)[1])
    assert captured.counts == {"rms_norm": 2}
    assert_same_results(captured)


def test_scale_on_top_stays_outside() -> None:
    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return hugging_face(x, w) * w[0] * 0.5

    captured = capture(scaled, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_symbolic_eps_is_passed_on() -> None:
    class Norm(nn.Module):
        eps = 1e-3

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    captured = capture(Norm(), tensors()[0], dynamic=True)
    (node,) = captured.operators()
    assert isinstance(node.args[2], torch.fx.Node)
    assert_same_results(captured)


def test_wide_result_keeps_the_cast_and_takes_the_wide_x() -> None:
    def stays_float32(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    captured = capture(stays_float32, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert captured.operators()[0].args[0].target == "float"  # type: ignore[union-attr]
    assert_same_results(captured)


def test_cast_to_a_third_dtype_stays_outside() -> None:
    def to_half(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w).to(torch.float16)

    captured = capture(to_half, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_factor_that_is_no_vector_stays_outside() -> None:
    def modulated(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * x * w * 2.0

    captured = capture(modulated, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert captured.operators()[0].args[1] is None
    assert_same_results(captured)


def test_weight_of_another_length_stays_outside() -> None:
    def broadcast(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[:1] * w[0]

    captured = capture(broadcast, *tensors())
    assert captured.operators()[0].args[1] is None
    assert_same_results(captured)


@pytest.mark.parametrize("transposed", [False, True])
def test_strided_input_keeps_its_layout(transposed: bool) -> None:
    def heads(x: Tensor, w: Tensor) -> Tensor:
        h = x.view(2, 3, 4, D)
        h = h.transpose(1, 2) if transposed else h
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        # A view that only the source's strides allow.
        return h.transpose(1, 2).view(2, 3, 4 * D) if transposed else h.view(2, 3, 4 * D)

    captured = capture(heads, torch.randn(2, 3, 4 * D), tensors()[1])
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_statistic_that_is_read_elsewhere_stays() -> None:
    def returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * r * w, r

    captured = capture(returned, *tensors())
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_rounded_statistic_is_refused_under_exact_numerics_only() -> None:
    def rounded(x: Tensor, w: Tensor) -> Tensor:
        r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        return x * r * w

    captured = capture(rounded, *tensors(torch.bfloat16))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)
    exact = capture(rounded, *tensors(torch.bfloat16), settings=Settings(numerics="exact"))
    assert exact.counts == {}
    assert "numerics" in exact.refusals[0]


@pytest.mark.parametrize("function", [hugging_face, cast_last, gemma, torchtune, called_by_name])
def test_common_spellings_are_exact(function: Function) -> None:
    captured = capture(function, *tensors(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"rms_norm": 1}
    x, w = captured.inputs
    assert torch.equal(captured.original(x, w)[0], captured.rewritten(x, w)[0])
