"""Gated MLPs and the linears around attention: decode, prefill and training.

    python benchmarks/swiglu.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Up to 64 rows the floor is the bytes of the weights: Llama 8B's MLP has 352 MB, which an H200 reads in 83 us. From 128
rows on it is arithmetic: gate and up are 2 x 2 x rows x 4096 x 14336 operations, a training step's three products in
the forward and six in the backward. Under the rows of training the notes say how much memory lies between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from command import main
from harness import Case, Device, Function, Impl, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, optional
from norms import random
from torch import Tensor
from torch.nn import functional as F

MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder layer's sizes. bias: whether q, k and v have one."""

    name: str
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False


LLAMA_8B = Shape("llama-8b", 4096, 14336, 32, 8, 128)
QWEN_05B = Shape("qwen2.5-0.5b", 896, 4864, 14, 2, 64, bias=True)
QWEN3_MOE = Shape("qwen3-30b-a3b", 2048, 768, 32, 4, 128)
TINY = Shape("tiny", 64, 160, 4, 2, 16, bias=True)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The first half of the MLP."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def packed_gate_up(x: Tensor, weight: Tensor) -> Tensor:
    """The same with one weight, gate first."""
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def experts(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The first half of each expert of a mixture, rows sorted by expert; weight [E, 2F, D]."""
    gate, up = torch._grouped_mm(x, weight.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    return F.silu(gate) * up


def experts_one_by_one(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The definition, for the reference."""
    groups = x.tensor_split(offsets[:-1].tolist())
    return torch.cat([packed_gate_up(rows, one) for rows, one in zip(groups, weight)])


def mlp(x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A decoder layer's second half."""
    return x + F.linear(gate_up(normalised(x, norm_weight), gate, up), down)


def mlp_alone(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Without norm and residual."""
    return F.linear(gate_up(x, gate, up), down)


def projections(x: Tensor, norm_weight: Tensor, *linears: Tensor) -> tuple[Tensor, ...]:
    """Norm, q, k and v: three weights, then their biases if there are any."""
    y = normalised(x, norm_weight)
    biases = linears[3:] or (None, None, None)
    return tuple(F.linear(y, weight, bias) for weight, bias in zip(linears, biases))


def packed_projections(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
    """The same out of one weight, which packing makes of frozen ones."""
    return F.linear(normalised(x, norm_weight), weight)


def layer(x: Tensor, heads: Tensor, norm1: Tensor, norm2: Tensor, *linears: Tensor) -> tuple[Tensor, ...]:
    """All linears of a decoder layer; `heads` stands for what attention makes of q, k and v.

    linears: output, gate, up, down, then q, k and v and their biases if there are any.
    """
    x = x + F.linear(heads, linears[0])
    return mlp(x, norm2, *linears[1:4]), *projections(x, norm1, *linears[4:])


def weights(g: torch.Generator, dtype: torch.dtype, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Each [F, D], as large as a linear's products stay near one."""
    return tuple(random(g, dtype, *shape) * shape[1] ** -0.5 for shape in shapes)


def few_rows_case(shape: Shape, rows: int, dtype: torch.dtype, part: str) -> Case:
    """part: "norm + MLP + residual", "norm + q/k/v", "norm + q/k/v, packed" or "layer without attention"."""
    dim, kv_dim, q_dim = shape.dim, shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    in_mlp = ((shape.hidden, dim), (shape.hidden, dim), (dim, shape.hidden))
    in_attention = ((q_dim, dim), (kv_dim, dim), (kv_dim, dim))
    function, num_norms, sizes = {
        "norm + MLP + residual": (mlp, 1, in_mlp),
        "norm + q/k/v": (projections, 1, in_attention),
        "norm + q/k/v, packed": (packed_projections, 1, ((q_dim + 2 * kv_dim, dim),)),
        "layer without attention": (layer, 2, ((dim, q_dim), *in_mlp, *in_attention)),
    }[part]

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        x = random(g, dtype, rows, dim)
        heads = (random(g, dtype, rows, q_dim),) if function is layer else ()
        norms = tuple(1 + 0.2 * random(g, dtype, dim) for _ in range(num_norms))
        biased = shape.bias and function in (projections, layer)
        biases = [random(g, dtype, size[0]) for size in in_attention] if biased else []
        return x, *heads, *norms, *weights(g, dtype, *sizes), *biases

    elements = sum(size[0] * size[1] for size in sizes)
    read = dim + (q_dim if function is layer else 0)
    written = (dim if function in (mlp, layer) else 0) + (0 if function is mlp else q_dim + 2 * kv_dim)
    return Case(
        name=f"{part} {shape.name} {rows} rows",
        inputs=inputs,
        eager=function,
        reference=function,
        impls=[eager(function), *compiled_pairs(function, *MODES)],
        bytes=dtype.itemsize * (elements + rows * (read + written)),
        flops=2 * rows * elements,
        dtype=dtype,
    )


def gate_up_case(shape: Shape, rows: int, dtype: torch.dtype, *, packed: bool, on_gpu: bool) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        matrices = weights(g, dtype, *[(shape.hidden, shape.dim)] * 2)
        return random(g, dtype, rows, shape.dim), *((torch.cat(matrices),) if packed else matrices)

    function: Function = packed_gate_up if packed else gate_up
    impls = [eager(function), *compiled_pairs(function, *MODES)]
    if on_gpu and not packed:
        impls.append(Impl("infuse-kernel", kernel, note="the operator, not compiled"))
    return Case(
        name=f"gate/up{', packed' if packed else ''} {shape.name} {rows} rows",
        inputs=inputs,
        eager=function,
        reference=function,
        impls=impls,
        bytes=dtype.itemsize * (2 * shape.hidden * shape.dim + rows * (shape.dim + shape.hidden)),
        flops=4 * rows * shape.dim * shape.hidden,
        dtype=dtype,
    )


def experts_case(shape: Shape, rows: int, dtype: torch.dtype, num_experts: int) -> Case:
    """Groups of rows as a router leaves them, the largest several times the smallest."""

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        (weight,) = weights(g, dtype, (num_experts * 2 * shape.hidden, shape.dim))
        shares = torch.rand(num_experts, generator=g, device=g.device) + 0.2
        ends = (shares.cumsum(0) / shares.sum() * rows).round().int()
        return random(g, dtype, rows, shape.dim), weight.view(num_experts, -1, shape.dim), ends

    elements = num_experts * 2 * shape.hidden * shape.dim
    return Case(
        name=f"gate/up of experts, {shape.name} {num_experts} experts {rows} rows",
        inputs=inputs,
        eager=experts,
        reference=experts_one_by_one,
        impls=[eager(experts), *compiled_pairs(experts, *MODES)],
        bytes=dtype.itemsize * (elements + rows * (shape.dim + shape.hidden)),
        flops=4 * rows * shape.dim * shape.hidden,
        dtype=dtype,
        sets=2,
    )


def kernel() -> Function:
    """The raw kernel of gate and up, with no compiler around it."""
    optional("infuse.ops.gated_linear_kernels")

    def run(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], gate.shape[0])
        torch.ops.infuse.gated_linear_out(x, gate, up, None, None, None, "silu", -1, out, None)
        return out

    return run


class Step:
    """Both passes: out, and the gradients of x and the weights for a given gradient of out."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._saved_bytes = 0

    def __call__(self, dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        before = torch.cuda.memory_allocated() if dout.is_cuda else 0
        out: Any = self._function(*leaves)
        if dout.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._saved_bytes = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def remark(self) -> str:
        return f"{self._saved_bytes / 1e6:.1f} MB between the passes" if self._saved_bytes else ""


def training_case(shape: Shape, rows: int, dtype: torch.dtype, *, alone: bool) -> Case:
    """The author's function is compiled, autograd around it is not."""
    sizes = [(shape.hidden, shape.dim)] * 2 + [(shape.dim, shape.hidden)]

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        dout, x = (random(g, dtype, rows, shape.dim) for _ in range(2))
        norm = () if alone else (1 + 0.2 * random(g, dtype, shape.dim),)
        return dout, x, *norm, *weights(g, dtype, *sizes)

    function: Function = mlp_alone if alone else mlp
    impls = [Impl("eager", lambda: Step(function))]
    impls += [_stepped(impl) for impl in compiled_pairs(function, *MODES)]
    elements = 3 * shape.hidden * shape.dim
    return Case(
        name=f"train {'MLP' if alone else 'norm + MLP + residual'} {shape.name} {rows} rows",
        inputs=inputs,
        eager=Step(function),
        reference=Step(function),
        impls=impls,
        bytes=3 * dtype.itemsize * (elements + rows * shape.dim),
        flops=6 * rows * elements,
        dtype=dtype,
        sets=2,
        grad=True,
        tolerance_factor=4.0,
    )


def _stepped(impl: Impl) -> Impl:
    return Impl(impl.name, lambda: Step(impl.prepare()), capture=impl.capture, note=impl.note)


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if quick or not on_gpu:
        for part in ("norm + MLP + residual", "norm + q/k/v", "layer without attention"):
            yield few_rows_case(TINY, 2, dtype, part)
        for packed in (False, True):
            yield gate_up_case(TINY, 96, dtype, packed=packed, on_gpu=False)
        for alone in (False, True):
            yield training_case(TINY, 96, dtype, alone=alone)
        return
    for rows in (1, 8, 16, 64):
        yield few_rows_case(LLAMA_8B, rows, dtype, "norm + MLP + residual")
        yield few_rows_case(LLAMA_8B, rows, dtype, "layer without attention")
    for rows in (1, 16):
        yield few_rows_case(LLAMA_8B, rows, dtype, "norm + q/k/v")
        for part in ("norm + MLP + residual", "norm + q/k/v", "layer without attention"):
            yield few_rows_case(QWEN_05B, rows, dtype, part)
    for part in ("norm + q/k/v", "norm + q/k/v, packed"):
        yield few_rows_case(LLAMA_8B, 512, dtype, part)
    for rows in (128, 512, 1024, 8192):
        yield gate_up_case(LLAMA_8B, rows, dtype, packed=False, on_gpu=on_gpu)
    for rows in (512, 8192):
        yield gate_up_case(LLAMA_8B, rows, dtype, packed=True, on_gpu=on_gpu)
    for rows in (4096, 32768):
        yield experts_case(QWEN3_MOE, rows, dtype, 128)
    for alone in (False, True):
        yield training_case(LLAMA_8B, 8192, dtype, alone=alone)


if __name__ == "__main__":
    raise SystemExit(main("swiglu", __doc__, cases))
