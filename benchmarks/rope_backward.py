"""Gradients of q and k through their rotation, and through the RMSNorm of each head before it.

    python benchmarks/rope_backward.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Alone a backward gets what the forward saved (q, k and the tables) and the gradients of the rotated heads, and returns
those of q, k and both weights. The floor is three tensors a head (x and dy read, dx written) and the tables: an H200's
copy bandwidth, 4.26 TB/s, allows 60 us at 8192 tokens with 32 + 8 heads of 128 in bf16. In a training step the forward
adds two. There both frameworks save what they like; peak_bytes shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from command import main
from harness import Case, Device, Function, Impl, compiled, compiled_pairs, eager
from implementations import optional
from rope import (
    EPS,
    LLAMA,
    MODES,
    Shape,
    heads_of,
    norm_rope,
    norm_weight,
    random,
    require_kernels,
    rope_interleaved,
    rotate_half,
    tables,
)
from torch import Tensor

Gradients = tuple[Tensor, Tensor]


def head_gradients(dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Gradients:
    """What autograd derives from transformers' norm and rotation of a head; dy [batch, heads, seq_len, head_dim]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g = (dy * cos - rotate_half(dy * sin)).transpose(1, 2)
    h = x.to(wide)
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    n = h * rstd
    dweight = (g * n.to(x.dtype)).flatten(0, -2).sum(0, dtype=wide).to(weight.dtype)
    g = (g * weight).to(wide)
    return (rstd * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype), dweight


def backward(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """dq, dk, q, k [batch, seq_len, heads, head_dim]; cos, sin [batch, seq_len, head_dim]."""
    dq, dk, cos, sin = dq.transpose(1, 2), dk.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    return *head_gradients(dq, q, q_weight, cos, sin), *head_gradients(dk, k, k_weight, cos, sin)


def operator(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """Infuse's operator, as the lowering finds it in the backward of a compiled graph."""
    numbers = (EPS, 0.0, True, False, False, False, False)
    tables = cos.unsqueeze(2), sin.unsqueeze(2)
    found: tuple[Tensor, ...] = torch.ops.infuse.qk_norm_rope_pair_bwd(
        dq, q, dk, k, *tables, q_weight, k_weight, *numbers
    )
    return found


def kernel() -> Function:
    optional("infuse.ops.qk_norm_rope_bwd")
    require_kernels()
    return operator


def inputs_of(shape: Shape, dtype: torch.dtype, *, gradients: bool) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        return (
            *(heads_of(shape, g, dtype) if gradients else ()),
            *heads_of(shape, g, dtype),
            *(norm_weight(g, dtype, shape.head_dim) for _ in range(2)),
            *tables(g, dtype, shape.batch, shape.seq_len, shape.head_dim),
        )

    return inputs


def traffic(shape: Shape, dtype: torch.dtype, tensors: int) -> int:
    """Bytes of so many tensors of all heads, and of both tables."""
    return shape.positions * shape.head_dim * (tensors * (shape.heads + shape.kv_heads) + 2) * dtype.itemsize


def alone(shape: Shape, dtype: torch.dtype, *, kernels: bool) -> Case:
    impls = [eager(backward)]
    for suffix, mode in MODES:
        impls.append(compiled(backward, "compile" + suffix, mode=mode))
        impls.append(compiled(operator, "infuse" + suffix, backend="infuse", mode=mode))
    if kernels:
        impls.append(Impl("infuse-kernel", kernel))
    return Case(
        name=f"q/k norm + rope backward {shape}",
        inputs=inputs_of(shape, dtype, gradients=True),
        eager=backward,
        reference=backward,
        impls=impls,
        bytes=traffic(shape, dtype, 3),
        flops=0,
        dtype=dtype,
    )


def with_gradients(function: Function, trained: int) -> Function:
    """(dq, dk, q, k, ...) -> the gradients of q, k and of as many of the rest as make `trained` in all."""

    def step(dq: Tensor, dk: Tensor, *args: Tensor) -> Any:
        inputs = [arg.detach().requires_grad_() for arg in args[:trained]]
        outputs: Sequence[Tensor] = function(*inputs, *args[trained:])  # type: ignore[assignment]
        return torch.autograd.grad(outputs, inputs, (dq.transpose(1, 2), dk.transpose(1, 2)))

    return step


def training(
    name: str,
    function: Function,
    trained: int,
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]],
    shape: Shape,
    dtype: torch.dtype,
    tensors: int,
) -> Case:
    step = with_gradients(function, trained)

    def trains(impl: Impl) -> Impl:
        return Impl(impl.name, lambda: with_gradients(impl.prepare(), trained), note=impl.note)

    return Case(
        name=f"train {name} {shape}",
        inputs=inputs,
        eager=step,
        reference=step,
        impls=[eager(step), *map(trains, compiled_pairs(function, *MODES))],
        bytes=traffic(shape, dtype, tensors),
        flops=0,
        dtype=dtype,
        grad=True,
    )


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = Shape(1, 64, 4, 2, 32) if quick else LLAMA if on_gpu else Shape(1, 1024, 8, 2, 64)

    def interleaved(g: torch.Generator) -> tuple[Tensor, ...]:
        table = random(g, torch.float32, shape.seq_len, shape.head_dim // 2, 2)
        return *heads_of(shape, g, dtype), *heads_of(shape, g, dtype), table

    yield alone(shape, dtype, kernels=on_gpu)
    both = inputs_of(shape, dtype, gradients=True)
    yield training("q/k norm + rope", norm_rope, 4, both, shape, dtype, 5)
    yield training("rope interleaved", rope_interleaved, 2, interleaved, shape, dtype, 4)


if __name__ == "__main__":
    raise SystemExit(main("rope_backward", __doc__, cases))
