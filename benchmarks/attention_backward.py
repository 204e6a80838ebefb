"""Attention in training: the backward pass alone, and a step of both passes; 32 query and 8 K/V heads of 128.

    python benchmarks/attention_backward.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Alone a backward gets q, k, v, out, the log-sum-exp and the gradient of out, and returns dq, dk and dv. The floor is
arithmetic: five products where the forward has two, at the rate of a large product of matrices. cuDNN, which SDPA picks
on Hopper, reaches 55% to 70% of that. In a step both frameworks save what they like; peak_bytes shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from attention_functions import expand, sdpa, sdpa_causal, written_out
from attention_prefill import Shape, causal_mask, softcapped
from command import main
from harness import Case, Device, Function, Impl, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, optional
from norms import random
from rope import require_kernels
from torch import Tensor

MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))
SETS = 2  # of inputs: a call takes longer than a cache lasts
_ROWS = 512  # of queries whose scores the reference holds at a time


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, a block of queries at a time; out and lse are computed again."""
    heads, kv_heads, queries, keys = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    wide_k, wide_v, scale = expand(k, heads), expand(v, heads), q.shape[-1] ** -0.5
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for first in range(0, queries, _ROWS):
        rows = slice(first, min(first + _ROWS, queries))
        scores = q[:, :, rows] @ wide_k.transpose(-1, -2) * scale
        if is_causal:
            hidden = torch.arange(keys, device=q.device) > torch.arange(queries, device=q.device)[rows, None]
            scores.masked_fill_(hidden, float("-inf"))
        weights, given = scores.softmax(-1), dout[:, :, rows]
        dv += weights.transpose(-1, -2) @ given
        dweights = given @ wide_v.transpose(-1, -2)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = dscores @ wide_k
        dk += dscores.transpose(-1, -2) @ q[:, :, rows]
    return dq, *(wide.unflatten(1, (kv_heads, -1)).sum(2) for wide in (dk, dv))


def torchs_operators(name: str, is_causal: bool) -> tuple[Function, Function]:
    """Forward and backward of one of SDPA's backends, as autograd calls them."""
    backends = optional("infuse.lowering.attention_backends")
    forward, backward = backends.OPERATORS[name]

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = backward(dout, q, k, v, out, lse, None, q.shape[-1] ** -0.5, is_causal)
        return found

    return lambda q, k, v: forward(q, k, v, None, q.shape[-1] ** -0.5, is_causal), run


def kernel(name: str, config: int = -1, *, is_causal: bool, deterministic: bool = False) -> Impl:
    """The raw kernel, with no compiler around it."""

    def prepare() -> Function:
        require_kernels()
        optional("infuse.ops.attention_training")

        def run(
            dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            flags = (None, None, q.shape[-1] ** -0.5, is_causal, 0.0, None, 0.0, None, deterministic, config)
            return torch.ops.infuse.attention_backward(dout, q, k, v, out, lse, *flags)  # type: ignore[no-any-return]

        return run

    return Impl(name, prepare, note="the operator, not compiled")


def backward_case(shape: Shape, dtype: torch.dtype, *, is_causal: bool, on_gpu: bool) -> Case:
    """The backward pass alone. What the forward saved comes from cuDNN on a GPU, from the definition elsewhere."""

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        q, k, v = shape.inputs(g, dtype)
        dout = random(g, dtype, shape.batch, shape.queries, shape.heads, shape.head_dim).transpose(1, 2)
        if on_gpu:
            out, lse = torchs_operators("sdpa_cudnn", is_causal)[0](q, k, v)
            return dout, q, k, v, out, lse
        scores = q @ expand(k, shape.heads).transpose(-1, -2) * shape.head_dim**-0.5
        if is_causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return dout, q, k, v, written_out(q, k, v, is_causal=is_causal), scores.logsumexp(-1)

    formula = partial(gradients, is_causal=is_causal)
    impls = [eager(formula)]
    if on_gpu:
        impls = [
            *(Impl(name.replace("_", "-"), lambda name=name: torchs_operators(name, is_causal)[1]) for name in _TORCHS),  # type: ignore[misc]
            kernel("infuse-kernel", is_causal=is_causal),
            kernel("infuse-kernel-deterministic", is_causal=is_causal, deterministic=True),
        ]
    author = torchs_operators("sdpa_cudnn", is_causal)[1] if on_gpu else formula
    name = f"backward{', causal' if is_causal else ''} {shape}"
    size, flops = 2 * shape.bytes(dtype.itemsize), 5 * shape.flops(_pairs(shape, is_causal)) // 2
    return Case(name, inputs, author, formula, impls, bytes=size, flops=flops, dtype=dtype, sets=SETS)


_TORCHS = ("sdpa_cudnn", "sdpa_flash")


def _pairs(shape: Shape, is_causal: bool) -> int:
    return shape.queries * (shape.queries + 1) // 2 if is_causal else shape.queries * shape.keys


def heads_inside(function: Function) -> Function:
    """`function` with its result as the projection behind it takes it, [B, S, H, D].

    torch.compile hands over a contiguous gradient of what it returns. For [B, H, S, D] cuDNN's backward would then see
    out and its gradient in different layouts, and give wrong gradients (torch 2.11).
    """

    def run(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        return function(q, k, v, *mask).transpose(1, 2)  # type: ignore[union-attr]

    return run


def step(function: Function) -> Function:
    """out and the gradients of q, k and v for a given gradient of out."""

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = function(*leaves, *mask)
        assert isinstance(out, Tensor)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    return run


def step_case(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    function: Function,
    mask: Callable[[torch.device], Tensor] | None,
    reference: Function,
) -> Case:
    """Both passes. The author's function is compiled, autograd around it is not."""

    function, reference = heads_inside(function), heads_inside(reference)

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        dout = random(g, dtype, shape.batch, shape.queries, shape.heads, shape.head_dim)
        tensors = (dout, *shape.inputs(g, dtype))
        return tensors if mask is None else (*tensors, mask(g.device))

    impls = [eager(step(function))]
    impls += [_stepped(impl) for impl in compiled_pairs(function, *MODES)]
    size, flops = 3 * shape.bytes(dtype.itemsize), 7 * shape.flops(_pairs(shape, True)) // 2
    return Case(
        f"step, {name} {shape}",
        inputs,
        step(function),
        step(reference),
        impls,
        bytes=size,
        flops=flops,
        dtype=dtype,
        sets=SETS,
        grad=True,
        tolerance_factor=4.0,
    )


def _stepped(impl: Impl) -> Impl:
    return Impl(impl.name, lambda: step(impl.prepare()), capture=impl.capture, note=impl.note)


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if quick or not on_gpu:
        shapes = [Shape(2, 96, 96, heads=4, kv_heads=2, head_dim=32)]
        alone = shapes
    else:
        alone = [Shape(1, 4096, 4096), Shape(1, 16384, 16384), Shape(4, 4096, 4096), Shape(4, 4096, 4096, head_dim=64)]
        shapes = [Shape(1, 4096, 4096)]
    for shape in alone:
        yield backward_case(shape, dtype, is_causal=True, on_gpu=on_gpu)
    for shape in dict.fromkeys((shapes[0], alone[-1])):
        yield backward_case(shape, dtype, is_causal=False, on_gpu=on_gpu)
    for shape in shapes:
        causal = partial(written_out, is_causal=True)
        yield step_case("causal", shape, dtype, sdpa_causal, None, causal)
        yield step_case("causal bool mask", shape, dtype, sdpa, partial(causal_mask, shape), written_out)
        capped = partial(written_out, is_causal=True, softcap=50.0)
        yield step_case("softcap, causal", shape, dtype, softcapped, None, capped)


if __name__ == "__main__":
    raise SystemExit(main("attention_backward", __doc__, cases))
