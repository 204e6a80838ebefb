"""What cuDNN's backward is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.ops.attention_cudnn_backward import with_own_key


def heads(size: tuple[int, ...], inside: bool) -> Tensor:
    batch, num, length, dim = size
    if inside:
        return torch.randn(batch, length, num, dim).transpose(1, 2)
    return torch.randn(size)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_gradient_and_output_lie_as_q_does_and_k_as_nothing_else(batch: int, inside: bool) -> None:
    q, k = heads((batch, 4, 6, 8), inside), heads((batch, 2, 10, 8), inside)
    for other in (False, True):
        dout, out = heads((batch, 4, 6, 8), other), heads((batch, 4, 6, 8), not other)
        found_dout, found_k, found_out = with_own_key(dout, q, k, out)
        for found, given in ((found_dout, dout), (found_k, k), (found_out, out)):
            assert torch.equal(found, given)
        sizes = slice(int(batch == 1), None)  # the stride of a single sequence means nothing
        assert found_dout.stride()[sizes] == found_out.stride()[sizes] == q.stride()[sizes]
        assert found_k.stride() == (k[0].numel() + 8, *k.stride()[1:])
        assert (found_k.data_ptr() == k.data_ptr()) == (batch == 1)


def test_a_stride_of_zero_is_laid_out() -> None:
    q, k = heads((2, 4, 6, 8), True), heads((2, 4, 6, 8), True)
    dout, _, _ = with_own_key(torch.ones(()).expand(q.shape), q, k, q)
    assert dout.stride() == q.stride() and torch.equal(dout, torch.ones_like(q))


def _formula(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
) -> tuple[Tensor, ...]:
    """As torch's operator for cuDNN, whose results are contiguous here."""
    assert dout.stride() == out.stride() == q.stride() and k.stride(0) == k[0].numel() + 8
    assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
    with torch.enable_grad():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
        answer = F.scaled_dot_product_attention(*leaves, rest[2], is_causal=rest[8], scale=scale, enable_gqa=True)
    return tuple(gradient.contiguous() for gradient in torch.autograd.grad(answer, leaves, dout))


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_operator_is_called_so(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", _formula)
    q, k, v = (heads((2, num, length, 8), True) for num, length in ((4, 6), (2, 10), (2, 10)))
    dout, lse = heads((2, 4, 6, 8), False), torch.randn(2, 6, 4).transpose(1, 2)
    mask = torch.rand(6, 10) < 0.7 if masked else None
    found = torch.ops.infuse.attention_cudnn_backward(dout, q, k, v, q, lse, mask, 0.3, False)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    answer = F.scaled_dot_product_attention(*leaves, mask, scale=0.3, enable_gqa=True)
    for gradient, right, like in zip(found, torch.autograd.grad(answer, leaves, dout), (q, k, v)):
        torch.testing.assert_close(gradient, right)
        assert gradient.stride() == like.stride()
