"""The norms' forward: alone, and between the operations that surround them in a model.

    python benchmarks/norms.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Alone the floor is what is read and written once: two tensors for a norm, four for a residual add and norm, three with a
gate. In context it is that of the whole expression: Inductor fuses a norm with its neighbours, so a rewrite that
replaces the norm by a kernel has to pay for what it no longer fuses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence

import norm_functions as functions
import torch
from command import main
from harness import Case, Device, Function, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS
from norm_kernels import kernels
from torch import Tensor

MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def norm_weight(generator: torch.Generator, dtype: torch.dtype, size: int) -> Tensor:
    """As trained weights are: around one, not one."""
    return (1 + 0.2 * torch.randn(size, generator=generator, device=generator.device)).to(dtype)


def alone(
    shape: Sequence[int],
    dtype: torch.dtype,
    spelling: Function = functions.hugging_face,
    *,
    on_gpu: bool = True,
    own_graphs: bool = False,
) -> Case:
    """RMSNorm. own_graphs: also mode="max-autotune" as users write it, with CUDA graphs of its own, whose inputs it
    copies."""
    numel, size = torch.Size(shape).numel(), dtype.itemsize
    impls = [eager(functions.builtin), eager(spelling, "eager-handwritten"), *compiled_pairs(spelling, *MODES)]
    impls += kernels("rms_norm") if on_gpu else []
    if own_graphs:
        impls += compiled_pairs(spelling, ("-max-autotune-cudagraphs", "max-autotune"))
    suffix = "" if spelling is functions.hugging_face else f" {spelling.__name__}"
    return Case(
        name="rms_norm " + "x".join(map(str, shape)) + suffix,
        inputs=lambda g: (random(g, dtype, *shape), norm_weight(g, dtype, shape[-1])),
        eager=spelling,
        reference=functions.exact,
        impls=impls,
        bytes=(2 * numel + shape[-1]) * size,
        flops=4 * numel,
        dtype=dtype,
    )


def form(
    kind: str,
    function: Function,
    reference: Function,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    inputs: int,
    outputs: int = 1,
    bias: bool = False,
    on_gpu: bool = True,
) -> Case:
    """Another norm of `inputs` tensors [rows, dim] with `outputs` results."""
    rows, dim = shape
    impls = [eager(function), *compiled_pairs(function, *MODES), *(kernels(kind) if on_gpu else [])]
    return Case(
        name=f"{kind} {rows}x{dim}",
        inputs=lambda g: (
            *(random(g, dtype, rows, dim) for _ in range(inputs)),
            norm_weight(g, dtype, dim),
            *([random(g, dtype, dim)] if bias else []),
        ),
        eager=function,
        reference=reference,
        impls=impls,
        bytes=((inputs + outputs) * rows + 1 + bias) * dim * dtype.itemsize,
        flops=8 * inputs * rows * dim,
        dtype=dtype,
    )


def forms(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, on_gpu: bool) -> Iterator[Case]:
    """The other norms, those with a gate and LayerNorm's residual add at the first shape only."""
    for shape in shapes:
        yield form(
            "add + rms_norm",
            functions.add_norm,
            functions.add_norm_exact,
            shape,
            dtype,
            inputs=2,
            outputs=2,
            on_gpu=on_gpu,
        )
        yield form(
            "layer_norm", functions.layer_norm, functions.layer_norm, shape, dtype, inputs=1, bias=True, on_gpu=on_gpu
        )
    added = functions.add_layer_norm
    yield form("add + layer_norm", added, added, shapes[0], dtype, inputs=2, outputs=2, bias=True, on_gpu=on_gpu)
    for kind, function, reference in (
        ("gate, rms_norm", functions.gate_first, functions.gate_first_exact),
        ("rms_norm, gate", functions.gate_last, functions.gate_last_exact),
    ):
        yield form(kind, function, reference, shapes[0], dtype, inputs=2, on_gpu=on_gpu)


def qk_norm(tokens: int, dtype: torch.dtype, on_gpu: bool) -> Case:
    """Queries and keys, 32 and 8 heads of 128, inside the packed result of their projection."""
    head_dim, taken, every = 128, 40, 48
    return Case(
        name=f"q/k norm {tokens}x(32+8)x{head_dim}",
        inputs=lambda g: (
            random(g, dtype, tokens, every * head_dim),
            norm_weight(g, dtype, head_dim),
            norm_weight(g, dtype, head_dim),
        ),
        eager=functions.qk_norm,
        reference=functions.qk_norm_exact,
        impls=[
            eager(functions.qk_norm),
            *compiled_pairs(functions.qk_norm, *MODES),
            *(kernels("q/k norm") if on_gpu else []),
        ],
        bytes=2 * tokens * taken * head_dim * dtype.itemsize,
        flops=4 * tokens * taken * head_dim,
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
    """A square projection with bias before the norm, one after it, and one on each side of a residual add and norm.

    No max-autotune: it would tune the GEMMs.
    """
    scale = dim**-0.5
    spelled = {
        "addmm + rms_norm": (functions.after_projection, functions.after_projection_exact),
        "rms_norm + mm": (functions.before_projection, functions.before_projection_exact),
        "mm + add + rms_norm + mm": (functions.between_projections, functions.between_projections_exact),
    }
    tensors = {"x": (rows, dim), "residual": (rows, dim), "bias": (dim,), "projection": (dim, dim), "weight": (dim,)}

    def make(names: Sequence[str], generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(
            norm_weight(generator, dtype, dim)
            if name == "weight"
            else random(generator, dtype, *tensors[name], scale=scale if name == "projection" else 1.0)
            for name in names
        )

    for name, (function, reference) in spelled.items():
        names = tuple(inspect.signature(function).parameters)
        middle = "residual" in names
        yield Case(
            name=f"{name} {rows}x{dim}",
            inputs=functools.partial(make, names),
            eager=function,
            reference=reference,
            impls=[eager(function), *compiled_pairs(function, MODES[0])],
            bytes=((4 if middle else 2) * rows * dim + dim * dim + 2 * dim) * dtype.itemsize,
            flops=(2 if middle else 1) * 2 * rows * dim * dim,
            dtype=dtype,
        )


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shapes: list[tuple[int, ...]]
    if quick:
        shapes, rows, dim, side, tokens = [(64, 256), (4, 8, 32)], 64, 256, 64, 16
        others = [(64, 256)]
    elif on_gpu:
        shapes = [(16384, 4096), (65536, 896), (8192, 16384), (1, 4096), (16, 4096), (8192, 32, 128), (2048, 65536)]
        shapes += [(16384, 2048), (8192, 5120), (8192, 8192)]
        rows, dim, side, tokens = 16384, 4096, 4096, 8192
        others = [(16384, 4096), (65536, 896), (8192, 16384), (16, 4096), (8192, 5120)]
    else:
        shapes, rows, dim, side, tokens = [(4096, 1024), (1, 1024), (512, 8, 64)], 4096, 1024, 512, 512
        others = [(4096, 1024)]
    for number, shape in enumerate(shapes):
        yield alone(shape, dtype, on_gpu=on_gpu, own_graphs=on_gpu and number == 0)
    yield alone(shapes[0], dtype, functions.torchtune, on_gpu=on_gpu)
    yield from forms(others, dtype, on_gpu)
    yield qk_norm(tokens, dtype, on_gpu)
    context, exact = "relu(rms_norm(x*2 + r)) + 1", functions.pointwise_context_exact
    yield in_context(context, functions.pointwise_context, exact, rows, dim, dtype, 1, 1)
    spelled = functions.pointwise_context_torchtune
    yield in_context(f"{context} torchtune", spelled, exact, rows, dim, dtype, 1, 1)
    chain, chain_exact = functions.residual_chain, functions.residual_chain_exact
    yield in_context("residual chain", chain, chain_exact, rows, dim, dtype, 2, 2)
    yield from projection_cases(side, side, dtype)


if __name__ == "__main__":
    raise SystemExit(main("norms", __doc__, cases))
