"""SDPA's backward in cuDNN within compiled graphs: what lies how when torch's operator is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from infuse.lowering.post_grad_pass import PostGradPass

ATEN = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
OURS = torch.ops.infuse.sdpa_cudnn_backward.default
B, H, S, T, D = 2, 4, 6, 10, 8


def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float) -> tuple[Tensor, ...]:
    p = torch.softmax(q @ k.mT * scale, -1)
    dp = dout @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ dout


@pytest.fixture
def seen() -> Iterator[list[list[Tensor]]]:
    """The tensors that torch's operator is called with, which the CPU pretends to have."""
    calls: list[list[Tensor]] = []

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: Any) -> Any:
        calls.append([dout, q, k, v, out, lse])
        found = gradients(q, k, v, dout, scale)
        return tuple(torch.empty_like(like).copy_(gradient) for gradient, like in zip(found, (q, k, v)))

    library = torch.library.Library("aten", "IMPL")
    library.impl(ATEN.name(), run, "CPU")
    yield calls
    library._destroy()


def heads(batch: int, length: int, inside: bool) -> Tensor:
    dense = torch.randn((batch, length, H, D) if inside else (batch, H, length, D))
    return dense.transpose(1, 2) if inside else dense


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    seed = torch.zeros((), dtype=torch.int64)
    given = (seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, False)
    found: tuple[Tensor, ...] = ATEN(dout, q, k, v, out, lse, *given, scale=0.3)
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
    function: Callable[..., Any], batch: int, inside: bool, dynamic: bool, seen: list[list[Tensor]]
) -> None:
    compiled = torch.compile(function, backend="infuse", fullgraph=True, dynamic=dynamic)
    factor = 1 if function is backward else 2
    for length in (S, S + 2):
        q, k, v = heads(batch, length, inside), heads(batch, T, inside), heads(batch, T, not inside)
        dout, out = heads(batch, length, False), heads(batch, length, True)
        lse = torch.randn(batch, length, H, 1).transpose(1, 2)
        found = compiled(dout, q, k, v, out, lse)
        given_dout, given_q, given_k, given_v, given_out, given_lse = seen[-1]
        sizes = slice(int(batch == 1), None)  # the stride of a single sequence means nothing
        assert given_dout.stride()[sizes] == given_out.stride()[sizes] == given_q.stride()[sizes] == q.stride()[sizes]
        assert given_k.stride() == (k[0].numel() + 8, *k.stride()[1:]) and given_v.stride()[sizes] == v.stride()[sizes]
        assert given_lse.is_contiguous()
        exact = gradients(q, factor * k, v, factor * dout, 0.3)
        for gradient, right in zip(found, exact):
            torch.testing.assert_close(gradient, factor * right)


def test_a_key_is_not_copied_for_a_single_sequence(seen: list[list[Tensor]]) -> None:
    tensors = [heads(1, S, True), heads(1, S, True), heads(1, T, True), heads(1, T, True), heads(1, S, True)]
    torch.compile(backward, backend="infuse")(*tensors, torch.randn(1, H, S, 1))
    assert [given.data_ptr() for given in seen[-1][:5]] == [tensor.data_ptr() for tensor in tensors]


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
