"""Rotary embedding of q and k: alone, behind an RMSNorm of each head, and before the write into a static KV cache.

    python benchmarks/rope.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

The floor: q and k read and written once, the tables read once, and in a cache's case v read and written too. q and k
are [batch, seq_len, heads, head_dim], as projections leave them; the answer is [batch, heads, seq_len, head_dim].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from command import main
from harness import Case, Device, Function, Impl, Unavailable, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, optional
from torch import Tensor

EPS = 1e-6
MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))


@dataclass(frozen=True, slots=True)
class Shape:
    """batch x seq_len positions of heads and kv_heads of head_dim."""

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.seq_len} {self.heads}+{self.kv_heads}x{self.head_dim}"

    @property
    def positions(self) -> int:
        return self.batch * self.seq_len


LLAMA = Shape(1, 8192, 32, 8, 128)
DECODE = (Shape(1, 1, 32, 8, 128), Shape(16, 1, 32, 8, 128), Shape(64, 1, 32, 8, 128))
PREFILL = (Shape(1, 512, 32, 8, 128), Shape(1, 4096, 32, 8, 128))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Qwen3's norm of a head in transformers."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def hugging_face(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [batch, heads, seq_len, head_dim]; cos, sin [batch, seq_len, head_dim]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return hugging_face(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def rope_interleaved(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As torchtune rotates: pairs of neighbours, in fp32, cos and sin side by side [seq_len, head_dim / 2, 2]."""
    return _interleaved(q, table), _interleaved(k, table)


def _interleaved(x: Tensor, table: Tensor) -> Tensor:
    pairs = x.to(table.dtype).reshape(*x.shape[:-1], -1, 2)
    cos, sin = table[None, :, None, :, 0], table[None, :, None, :, 1]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(3)
    return turned.type_as(x).transpose(1, 2)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return hugging_face(norm(q, q_weight).transpose(1, 2), norm(k, k_weight).transpose(1, 2), cos, sin)


def cache_write(
    heads: int,
    packed: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
) -> Tensor:
    """packed [batch, seq_len, all heads, head_dim]; caches [batch, kv_heads, cache_len, head_dim]. Returns q."""
    kv_heads = k_cache.shape[1]
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=2)
    q, k = norm_rope(q, k, q_weight, k_weight, cos, sin)
    k_cache.index_copy_(2, positions, k)
    v_cache.index_copy_(2, positions, v.transpose(1, 2))
    return q


def require_kernels() -> None:
    optional("infuse.ops.rope_kernels")
    missing = optional("infuse.ops.library").missing(torch.device("cuda"))
    if missing:
        raise Unavailable(missing)


def kernel_rope(config: int = -1, *, has_norm: bool) -> Function:
    """The raw kernel, with no compiler around it."""
    require_kernels()

    def run(q: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        weights = rest[:-2] if has_norm else (None, None)
        cos, sin = rest[-2].unsqueeze(2), rest[-1].unsqueeze(2)
        outs = torch.empty_like(q), torch.empty_like(k)
        eps = EPS if has_norm else None
        flags = (False, False, False, False)
        torch.ops.infuse.rope_out(q, k, cos, sin, *weights, eps, 0.0, True, *flags, False, config, *outs)
        return outs[0].transpose(1, 2), outs[1].transpose(1, 2)

    return run


def kernel_interleaved(config: int = -1) -> Function:
    require_kernels()

    def run(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        outs = torch.empty_like(q), torch.empty_like(k)
        cos, sin = table[None, :, None, :, 0], table[None, :, None, :, 1]
        flags = (True, True, False, True)
        torch.ops.infuse.rope_out(q, k, cos, sin, None, None, None, 0.0, False, *flags, False, config, *outs)
        return outs[0].transpose(1, 2), outs[1].transpose(1, 2)

    return run


def kernel_cache_write(heads: int, config: int = -1) -> Function:
    require_kernels()

    def run(packed: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Tensor) -> Tensor:
        cos, sin, k_cache, v_cache, positions = rest
        kv_heads = k_cache.shape[1]
        q, k, v = packed.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
        out = torch.empty(packed.shape[0], packed.shape[1], heads, packed.shape[3], device="cuda", dtype=packed.dtype)
        out = out.transpose(1, 2)
        tables = [table.unsqueeze(1) for table in (cos, sin)]
        torch.ops.infuse.rope_cache_write_out(
            *(q, k, v, *tables, *tables, positions, positions, q_weight, k_weight),
            *(EPS, 0.0, True, False, False, False, False, config, k_cache, v_cache, out),
        )
        return out

    return run


def liger_norm_rope() -> Function:
    """Liger's norm, then its rotation, which works in place on what the norm made."""
    rms_norm = optional("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    rotation = optional("liger_kernel.ops.rope").LigerRopeFunction

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        q = rms_norm.apply(q, q_weight, EPS, 0.0, "llama", False).transpose(1, 2)
        k = rms_norm.apply(k, k_weight, EPS, 0.0, "llama", False).transpose(1, 2)
        rotated: Sequence[Tensor] = rotation.apply(q, k, cos, sin)
        return rotated

    return run


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def norm_weight(generator: torch.Generator, dtype: torch.dtype, size: int) -> Tensor:
    return (1 + 0.2 * torch.randn(size, generator=generator, device=generator.device)).to(dtype)


def tables(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """Factors [*shape], the same for both halves of a row."""
    angles = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator, device=generator.device) * 3
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def heads_of(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    leading = (shape.batch, shape.seq_len)
    return [random(generator, dtype, *leading, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads)]


def traffic(shape: Shape, dtype: torch.dtype, heads: int) -> int:
    """Bytes of `heads` heads read and written, and of two tables of a head each."""
    return shape.positions * shape.head_dim * (2 * heads + 2) * dtype.itemsize


def case_of(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    function: Function,
    inputs: Callable[[torch.Generator], Sequence[Tensor]],
    others: Sequence[Impl],
    written_heads: int = 0,
) -> Case:
    """others: implementations beside eager and the compiled ones. written_heads: beside those of q and k."""
    return Case(
        name=f"{name} {shape}",
        inputs=inputs,
        eager=function,
        reference=function,
        impls=[eager(function), *compiled_pairs(function, *MODES), *others],
        bytes=traffic(shape, dtype, shape.heads + shape.kv_heads + written_heads),
        flops=0,
        dtype=dtype,
    )


def alone(shape: Shape, dtype: torch.dtype, *, kernels: bool) -> Case:
    def inputs(g: torch.Generator) -> Sequence[Tensor]:
        return *heads_of(shape, g, dtype), *tables(g, dtype, shape.batch, shape.seq_len, shape.head_dim)

    others = [Impl("infuse-kernel", functools.partial(kernel_rope, has_norm=False))]
    return case_of("rope", shape, dtype, rope, inputs, others if kernels else [])


def interleaved(shape: Shape, dtype: torch.dtype, *, kernels: bool) -> Case:
    def inputs(g: torch.Generator) -> Sequence[Tensor]:
        return *heads_of(shape, g, dtype), random(g, torch.float32, shape.seq_len, shape.head_dim // 2, 2)

    others = [Impl("infuse-kernel", kernel_interleaved)]
    return case_of("rope interleaved", shape, dtype, rope_interleaved, inputs, others if kernels else [])


def with_norm(shape: Shape, dtype: torch.dtype, *, kernels: bool) -> Case:
    def inputs(g: torch.Generator) -> Sequence[Tensor]:
        return (
            *heads_of(shape, g, dtype),
            *(norm_weight(g, dtype, shape.head_dim) for _ in range(2)),
            *tables(g, dtype, shape.batch, shape.seq_len, shape.head_dim),
        )

    others = [
        Impl("infuse-kernel", functools.partial(kernel_rope, has_norm=True)),
        Impl("liger", liger_norm_rope),
    ]
    return case_of("q/k norm + rope", shape, dtype, norm_rope, inputs, others if kernels else [])


def into_cache(shape: Shape, cache_len: int, dtype: torch.dtype, *, kernels: bool) -> Case:
    """The answer that is checked is q; tests compare the caches."""

    def function(packed: Tensor, *rest: Tensor) -> Tensor:
        return cache_write(shape.heads, packed, *rest)  # type: ignore[arg-type]

    def inputs(g: torch.Generator) -> Sequence[Tensor]:
        cache = (shape.batch, shape.kv_heads, cache_len, shape.head_dim)
        all_heads = shape.heads + 2 * shape.kv_heads
        return (
            random(g, dtype, shape.batch, shape.seq_len, all_heads, shape.head_dim),
            *(norm_weight(g, dtype, shape.head_dim) for _ in range(2)),
            *tables(g, dtype, shape.batch, shape.seq_len, shape.head_dim),
            *(random(g, dtype, *cache) for _ in range(2)),
            torch.arange(shape.seq_len, device=g.device) + cache_len // 2,
        )

    others = [Impl("infuse-kernel", functools.partial(kernel_cache_write, shape.heads))]
    name = "q/k norm + rope + cache write"
    return case_of(name, shape, dtype, function, inputs, others if kernels else [], shape.kv_heads)


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    large = Shape(1, 64, 4, 2, 32) if quick else LLAMA if on_gpu else Shape(1, 1024, 8, 2, 64)
    yield with_norm(large, dtype, kernels=on_gpu)
    yield alone(large, dtype, kernels=on_gpu)
    yield interleaved(large, dtype, kernels=on_gpu)
    decode = (Shape(2, 1, 4, 2, 32),) if quick else DECODE
    yield with_norm(decode[0], dtype, kernels=on_gpu)
    for shape in decode if quick else (*DECODE, *PREFILL):
        yield into_cache(shape, 64 if quick else 8192, dtype, kernels=on_gpu)


if __name__ == "__main__":
    raise SystemExit(main("rope", __doc__, cases))
