"""SDPA's backward in cuDNN within compiled graphs: what lies how when torch's operator is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from infuse.lowering import attention_backends
from infuse.lowering.post_grad_pass import PostGradPass
from tests.lowering.pretended_attention import sdpa_gradients

ATEN = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
OURS = torch.ops.infuse.sdpa_cudnn_backward.default
B, H, S, T, D = 2, 4, 6, 10, 8
SCALE = 0.3


def heads(batch: int, length: int, inside: bool) -> Tensor:
    dense = torch.randn((batch, length, H, D) if inside else (batch, H, length, D))
    return dense.transpose(1, 2) if inside else dense


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    seed = torch.zeros((), dtype=torch.int64)
    rest = (seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, False)
    found: tuple[Tensor, ...] = ATEN(dout, q, k, v, out, lse, *rest, scale=SCALE)
    return found


def made(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """What is given is made in the graph, and what comes back is read there."""
    found = backward(dout * 2, q, k * 2, v, out + 1, lse)
    return tuple(gradient * 2 for gradient in found)


@pytest.mark.parametrize(
    ("function", "batch", "inside", "dynamic"),
    [(backward, 1, False, False), (backward, B, True, False), (made, 1, True, False), (made, B, False, True)],
)
def test_gradient_and_output_lie_as_q_does_and_k_as_nothing_else(
    function: Callable[..., Any], batch: int, inside: bool, dynamic: bool, cudnn_calls: list[tuple[Any, ...]]
) -> None:
    compiled = torch.compile(function, backend="infuse", fullgraph=True, dynamic=dynamic)
    factor = 1 if function is backward else 2
    for length in (S, S + 2):
        q, k, v = heads(batch, length, inside), heads(batch, T, inside), heads(batch, T, not inside)
        dout, out = heads(batch, length, False), heads(batch, length, True)
        lse = torch.randn(batch, length, H, 1).transpose(1, 2)
        found = compiled(dout, q, k, v, out, lse)
        given_dout, given_q, given_k, given_v, given_out, given_lse = cudnn_calls[-1][:6]
        sizes = slice(int(batch == 1), None)  # the stride of a single sequence means nothing
        assert given_dout.stride()[sizes] == given_out.stride()[sizes] == given_q.stride()[sizes] == q.stride()[sizes]
        assert given_k.stride() == (k[0].numel() + 8, *k.stride()[1:]) and given_v.stride()[sizes] == v.stride()[sizes]
        assert given_lse.is_contiguous()
        for gradient, right in zip(found, sdpa_gradients(factor * dout, q, factor * k, v, None, SCALE)):
            torch.testing.assert_close(gradient, factor * right)


def test_nothing_is_copied_for_a_single_sequence(cudnn_calls: list[tuple[Any, ...]]) -> None:
    tensors = [heads(1, length, True) for length in (S, S, T, T, S)]
    torch.compile(backward, backend="infuse")(*tensors, torch.randn(1, H, S, 1))
    assert [given.data_ptr() for given in cudnn_calls[-1][:5]] == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("masked", [False, True])
def test_behind_another_forward_it_is_called_so_too(masked: bool, cudnn_calls: list[tuple[Any, ...]]) -> None:
    _, formula = attention_backends.OPERATORS["sdpa_cudnn"]
    dout, q, k, v, out = (heads(B, length, True) for length in (S, S, T, T, S))
    lse, mask = torch.randn(B, S, H).transpose(1, 2), torch.rand(S, T) < 0.7 if masked else None
    found = torch.compile(formula, backend="infuse", fullgraph=True)(dout, q, k, v, out, lse, mask, SCALE, False)
    bias = None if mask is None else torch.where(mask, 0.0, float("-inf"))
    for gradient, right in zip(found, sdpa_gradients(dout, q, k, v, bias, SCALE)):
        torch.testing.assert_close(gradient, right)
    (call,) = cudnn_calls
    assert call[2].stride(0) == k[0].numel() + 8 and call[5].shape == (B, H, S, 1) and call[5].is_contiguous()


@pytest.mark.parametrize("cpp", [False, True])
def test_every_backward_in_cudnn_is_called_so(cpp: bool) -> None:
    graph = Graph()
    inputs = [graph.placeholder(f"tensor_{i}") for i in range(8)]
    node = graph.call_function(ATEN, (*inputs, None, None, None, 6, 10, 0.0, False), {"scale": 0.5})
    graph.output(node)
    with torch._inductor.config.patch(cpp_wrapper=cpp):
        PostGradPass("")(graph)
    assert node.target is OURS
    names = [[argument.name for argument in operator._schema.arguments] for operator in (ATEN, OURS)]
    assert names[0] == names[1]
