"""RMSNorm forward: alone, and between the operations that surround it in a model.

    python benchmarks/norms.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Alone the floor is two tensors (read x, write y). In context it is that of the whole expression: Inductor fuses a norm
with its neighbours, so a rewrite that replaces the norm by a kernel has to pay for what it no longer fuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from command import main
from harness import Case, Device, Function, Impl, Unavailable, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, optional
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))


def hugging_face(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's norm in transformers: statistics in fp32, cast, then the weight."""
    dtype = x.dtype
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(variance + EPS)
    return weight * normed.to(dtype)


def torchtune(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's norm in torchtune: all of it in fp32, the cast last."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight=weight, eps=EPS).to(x.dtype)


def builtin(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight=weight, eps=EPS)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """The reference, in the dtype of x throughout."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def pointwise_context(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(hugging_face(x * 2 + residual, weight)) + 1


def pointwise_context_torchtune(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(torchtune(x * 2 + residual, weight)) + 1


def pointwise_context_exact(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(exact(x * 2 + residual, weight)) + 1


def after_projection(x: Tensor, bias: Tensor, projection: Tensor, weight: Tensor) -> Tensor:
    return torchtune(torch.addmm(bias, x, projection), weight)


def after_projection_exact(x: Tensor, bias: Tensor, projection: Tensor, weight: Tensor) -> Tensor:
    return exact(torch.addmm(bias, x, projection), weight)


def before_projection(x: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    return hugging_face(x, weight) @ projection


def before_projection_exact(x: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    return exact(x, weight) @ projection


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return hugging_face(total, weight), total


def add_norm_exact(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return exact(total, weight), total


def residual_chain(x: Tensor, residual: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two residual adds with a norm each, a cheap branch between them instead of a layer's projections."""
    total = residual + x
    total = total + F.silu(torchtune(total, first))
    return torchtune(total, second), total


def residual_chain_exact(x: Tensor, residual: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    total = total + F.silu(exact(total, first))
    return exact(total, second), total


def liger() -> Function:
    function = optional("liger_kernel.ops.rms_norm").LigerRMSNormFunction

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = function.apply(x, weight, EPS, 0.0, "llama", False)
        return result

    return norm


def infuse_kernel() -> Function:
    """The raw kernel, with the launcher's own choice of configuration and no compiler around it."""
    optional("infuse.ops.rms_norm")
    missing = optional("infuse.ops.library").missing(torch.device("cuda"))
    if missing:
        raise Unavailable(missing)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.infuse.rms_norm_out(x, weight, EPS, 0.0, True, False, -1, out)
        return out

    return norm


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def norm_weight(generator: torch.Generator, dtype: torch.dtype, size: int) -> Tensor:
    """As trained weights are: around one, not one."""
    return (1 + 0.2 * torch.randn(size, generator=generator, device=generator.device)).to(dtype)


def alone(
    shape: Sequence[int],
    dtype: torch.dtype,
    spelling: Function = hugging_face,
    *,
    kernels: bool = True,
    own_graphs: bool = False,
) -> Case:
    """kernels: also those that need a GPU and no compiler. own_graphs: also mode="max-autotune" as users write it, with
    CUDA graphs of its own, into which it copies its inputs."""
    numel, size = torch.Size(shape).numel(), dtype.itemsize
    impls = [eager(builtin), eager(spelling, "eager-handwritten"), *compiled_pairs(spelling, *MODES)]
    if kernels:
        note = "torch.ops.infuse.rms_norm_out, not compiled"
        impls += [Impl("infuse-kernel", infuse_kernel, note=note), Impl("liger", liger)]
    if own_graphs:
        impls += compiled_pairs(spelling, ("-max-autotune-cudagraphs", "max-autotune"))
    suffix = "" if spelling is hugging_face else f" {spelling.__name__}"
    return Case(
        name="rms_norm " + "x".join(map(str, shape)) + suffix,
        inputs=lambda g: (random(g, dtype, *shape), norm_weight(g, dtype, shape[-1])),
        eager=spelling,
        reference=exact,
        impls=impls,
        bytes=(2 * numel + shape[-1]) * size,
        flops=4 * numel,
        dtype=dtype,
    )


def in_context(
    name: str,
    function: Function,
    reference: Function,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    norms: int,
    outputs: int,
) -> Case:
    """`function` of two tensors [rows, dim] and `norms` weights, with `outputs` results [rows, dim]."""
    return Case(
        name=f"{name} {rows}x{dim}",
        inputs=lambda g: (
            random(g, dtype, rows, dim),
            random(g, dtype, rows, dim),
            *(norm_weight(g, dtype, dim) for _ in range(norms)),
        ),
        eager=function,
        reference=reference,
        impls=[eager(function), *compiled_pairs(function, *MODES)],
        bytes=((2 + outputs) * rows * dim + norms * dim) * dtype.itemsize,
        flops=8 * rows * dim * norms,
        dtype=dtype,
    )


def projection_cases(rows: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """A square projection with bias before the norm, and one after it. No max-autotune: it would tune the GEMMs."""
    traffic, flops = (2 * rows * dim + dim * dim + 2 * dim) * dtype.itemsize, 2 * rows * dim * dim
    scale = dim**-0.5
    modes = (MODES[0],)
    yield Case(
        name=f"addmm + rms_norm {rows}x{dim}",
        inputs=lambda g: (
            random(g, dtype, rows, dim),
            random(g, dtype, dim),
            random(g, dtype, dim, dim, scale=scale),
            norm_weight(g, dtype, dim),
        ),
        eager=after_projection,
        reference=after_projection_exact,
        impls=[eager(after_projection), *compiled_pairs(after_projection, *modes)],
        bytes=traffic,
        flops=flops,
        dtype=dtype,
    )
    yield Case(
        name=f"rms_norm + mm {rows}x{dim}",
        inputs=lambda g: (
            random(g, dtype, rows, dim),
            norm_weight(g, dtype, dim),
            random(g, dtype, dim, dim, scale=scale),
        ),
        eager=before_projection,
        reference=before_projection_exact,
        impls=[eager(before_projection), *compiled_pairs(before_projection, *modes)],
        bytes=traffic,
        flops=flops,
        dtype=dtype,
    )


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if quick:
        shapes, rows, dim, side = [(64, 256), (4, 8, 32)], 64, 256, 64
    elif on_gpu:
        shapes = [(16384, 4096), (65536, 896), (8192, 16384), (1, 4096), (16, 4096), (8192, 32, 128)]
        rows, dim, side = 16384, 4096, 4096
    else:
        shapes, rows, dim, side = [(4096, 1024), (1, 1024), (512, 8, 64)], 4096, 1024, 512
    for number, shape in enumerate(shapes):
        yield alone(shape, dtype, kernels=on_gpu, own_graphs=on_gpu and number == 0)
    yield alone(shapes[0], dtype, torchtune, kernels=on_gpu)
    context = "relu(rms_norm(x*2 + r)) + 1"
    yield in_context(context, pointwise_context, pointwise_context_exact, rows, dim, dtype, 1, 1)
    yield in_context(
        f"{context} torchtune", pointwise_context_torchtune, pointwise_context_exact, rows, dim, dtype, 1, 1
    )
    yield in_context("add + rms_norm", add_norm, add_norm_exact, rows, dim, dtype, 1, 2)
    yield in_context("residual chain", residual_chain, residual_chain_exact, rows, dim, dtype, 2, 2)
    yield from projection_cases(side, side, dtype)


if __name__ == "__main__":
    raise SystemExit(main("norms", __doc__, cases))
