"""Attention through torch.compile on a GPU: kernels in the graph, forwards and backwards, against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import infuse
from infuse.lowering import decisions
from infuse.ops.attention import attention_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

OPS = torch.ops.infuse
BF16 = torch.bfloat16
B, H, KV_HEADS, S, D = 2, 8, 2, 200, 64


def make(grad: bool = False, dim: int = D) -> list[Tensor]:
    """q, k and v as projections leave them."""
    heads = (H, KV_HEADS, KV_HEADS)
    tensors = [torch.randn(B, S, count, dim, device="cuda").to(BF16).transpose(1, 2) for count in heads]
    return [tensor.requires_grad_(grad) for tensor in tensors]


def causal_mask() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool, device="cuda").tril()[None, None].expand(B, 1, S, S).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As transformers' eager attention of Gemma 2, with its cap."""
    k, v = (kv.repeat_interleave(H // KV_HEADS, 1) for kv in (k, v))
    scores = q @ k.transpose(2, 3) * D**-0.5
    scores = torch.tanh(scores / 20.0) * 20.0
    scores = scores + torch.where(mask, 0.0, torch.finfo(BF16).min).to(BF16)
    return (F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def reference(function: Callable[..., Tensor], tensors: list[Tensor], *rest: Tensor) -> list[Tensor]:
    """The function and its gradients in fp64, for a gradient of ones."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    cap = 20.0 if function is by_hand else 0.0
    out = attention_ref(*wide, rest[0], D**-0.5, False, cap).transpose(1, 2)
    return [out, *torch.autograd.grad(out.sum(), wide)]


def assert_close(found: list[Tensor], exact: list[Tensor]) -> None:
    for got, right in zip(found, exact, strict=True):
        assert got.shape == right.shape
        assert (got.double() - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs", "reduce-overhead"])
@pytest.mark.parametrize("function", [sdpa, by_hand])
def test_inference(function: Callable[..., Tensor], mode: str | None) -> None:
    tensors, mask = make(), causal_mask()

    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return function(q + function(q, k, v, mask).transpose(1, 2), k, v, mask)

    decisions.clear()
    with torch.no_grad(), infuse.override(kernels="auto" if mode and "autotune" in mode else "always"):
        compiled = torch.compile(layers, backend="infuse", mode=mode, fullgraph=True)
        for _ in range(3):
            found = compiled(*tensors, mask)
        exact = layers(*tensors, mask)
    torch.testing.assert_close(found, exact, atol=3e-2, rtol=3e-2)
    assert len(decisions.decisions()) >= 2


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("function", [sdpa, by_hand])
def test_training(function: Callable[..., Tensor], mode: str | None) -> None:
    tensors, mask = make(grad=True), causal_mask()
    with infuse.override(kernels="always" if mode is None else "auto"):
        out = torch.compile(function, backend="infuse", mode=mode, fullgraph=True)(*tensors, mask)
        found = [out, *torch.autograd.grad(out.sum(), tensors)]
    assert_close(found, reference(function, tensors, mask))


@pytest.mark.parametrize("inside", [False, True])
def test_few_shared_heads_train_in_torchs_kernels(inside: bool) -> None:
    """Over K and V of each head; dout as either order of its dimensions leaves it."""
    q, k, v = (
        torch.randn(1, 1024, heads, D, device="cuda").to(BF16).transpose(1, 2).requires_grad_() for heads in (6, 2, 2)
    )
    dout = torch.randn(1, 1024, 6, D, device="cuda").to(BF16)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    decisions.clear()
    out = torch.compile(function, backend="infuse", fullgraph=True)(q, k, v)
    given = dout if inside else dout.transpose(1, 2).contiguous().transpose(1, 2)
    found = [out, *torch.autograd.grad(out, (q, k, v), given)]
    assert not [decision for decision in decisions.decisions() if decision.op.startswith("attention")]
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    mask = torch.ones(1024, 1024, dtype=torch.bool, device="cuda").tril()
    right = attention_ref(*wide, mask, D**-0.5, False, 0.0).transpose(1, 2)
    assert_close(found, [right, *torch.autograd.grad(right, wide, dout.double())])


def test_training_with_dropout_keeps_the_mean_and_the_seed() -> None:
    tensors = make(grad=True)

    @torch.compile(backend="infuse", fullgraph=True)
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, enable_gqa=True)
        return out.transpose(1, 2)

    with infuse.override(kernels="always"):
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            out = dropped(*tensors)
            runs.append([out, *torch.autograd.grad(out.sum(), tensors)])
    assert all(torch.equal(first, again) for first, again in zip(runs[0][:1], runs[1][:1]))
    assert not torch.equal(runs[0][0], runs[2][0])
    ones = torch.ones(B, KV_HEADS, 4096, D, device="cuda", dtype=BF16)
    flat = torch.zeros(B, H, S, D, device="cuda", dtype=BF16)
    kept = infuse.ops.attention_training._forward(
        flat,
        torch.zeros_like(ones),
        ones,
        None,
        None,
        0.1,
        False,
        0.0,
        None,
        False,
        0.4,
        torch.tensor([1, 2]).cuda(),
        -1,
    )[0]
    assert (kept.double().mean() - 1).abs() < 5e-3


def shaped(length: int, *, inside: bool) -> Tensor:
    """A gradient [B, H, length, D], whose heads lie inside in memory or not."""
    size = (B, length, H, D) if inside else (B, H, length, D)
    dense = torch.randn(size, device="cuda").to(BF16)
    return dense.transpose(1, 2) if inside else dense


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_cudnns_backward_whatever_the_layout_of_the_gradient(inside: bool, is_causal: bool) -> None:
    """torch's own operator is wrong where an earlier call of its sizes had a gradient that lay differently."""
    length = 128 + 8 * inside + 16 * is_causal  # sizes of its own for each case: torch remembers them
    q, k, v = (torch.randn(B, length, H, D, device="cuda").to(BF16).transpose(1, 2) for _ in range(3))
    scale, aten = D**-0.5, torch.ops.aten
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    seed = torch.empty((), dtype=torch.int64, device="cuda")
    rest = (seed, seed, None, None, None, length, length, 0.0, is_causal)
    first, dout = shaped(length, inside=inside), shaped(length, inside=not inside)
    aten._scaled_dot_product_cudnn_attention_backward(first, q, k, v, out, lse, *rest, scale=scale)
    wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    exact = torch.autograd.grad(attention_ref(*wide, None, scale, is_causal), wide, dout.double())

    @torch.compile(backend="infuse", dynamic=False)
    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        return aten._scaled_dot_product_cudnn_attention_backward(*tensors, *rest, scale=scale)

    assert_close(list(again(dout, q, k, v, out, lse)), list(exact))


@pytest.mark.parametrize("compiled_first", [False, True])
def test_attention_that_is_torchs_trains_right_whoever_called_cudnn_before(compiled_first: bool) -> None:
    """And who calls it later is right as well: what compiled code calls leaves nothing to others."""
    length = 168 + 8 * compiled_first  # torch remembers sizes
    given = (torch.randn(B, length, H, D, device="cuda").to(BF16) for _ in range(3))
    tensors = [tensor.transpose(1, 2).requires_grad_() for tensor in given]

    @torch.compile(backend="infuse", fullgraph=True, dynamic=False)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.softmax(q @ k.transpose(2, 3) * D**-0.5, -1) @ v).transpose(1, 2)

    def check(is_compiled: bool) -> None:
        dout = shaped(length, inside=is_compiled)
        found = attend(*tensors).transpose(1, 2) if is_compiled else F.scaled_dot_product_attention(*tensors)
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        exact = torch.autograd.grad(attention_ref(*wide, None, D**-0.5), wide, dout.double())
        assert_close(list(torch.autograd.grad(found, tensors, dout)), list(exact))

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), infuse.override(kernels="never"):
        if not compiled_first:
            check(False)
        _, codes = run_and_get_code(check, True)
        if compiled_first:
            check(False)
    assert "_scaled_dot_product_cudnn_attention_backward" in codes[-1]


def test_deterministic_training_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, mask = make(grad=True), causal_mask()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with infuse.override(kernels="always"):
            compiled: Any = torch.compile(sdpa, backend="infuse", fullgraph=True)
            runs = [torch.autograd.grad(compiled(*tensors, mask).sum(), tensors) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, again) for first, again in zip(*runs))
