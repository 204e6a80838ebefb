"""Backward of the norms: alone, and with the forward in a training step.

    python benchmarks/norm_backward.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

Alone a backward gets what the forward saved (the input and rstd, for LayerNorm also the mean) and the gradient of y,
and returns those of x, weight and bias. The floor is three tensors (x and dy read, dx written), four where a residual
add precedes the norm, whose other gradient is read in the same pass: an H200's copy bandwidth, 4.26 TB/s, allows 94 us
at 16384x4096, 83 us at 65536x896 and 189 us at 8192x16384. Stock compile reaches 2.83, 3.00 and 2.30 TB/s there: its
sums for the weight's gradient read x and dy again, or are split over several kernels. A kernel that reads each row once
and keeps those sums in registers should come within 10% of the copy.

In a training step both frameworks save what they like between forward and backward; peak_bytes shows it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from command import main
from harness import Case, Device, Function, Impl, Unavailable, compiled, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS, optional
from norm_functions import EPS, add_norm, hugging_face
from norms import norm_weight, random
from torch import Tensor
from torch.nn import functional as F

Modes = Sequence[tuple[str, str | None]]
# dy and dsum are drawn around zero, as gradients are; the reference follows from them in fp64.
DEFAULT: Modes = (("", None),)
MODES: Modes = (*DEFAULT, ("-max-autotune", NO_CUDAGRAPHS))


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd derives from Llama's norm in transformers, statistics in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.to(wide) * rstd.unsqueeze(-1)
    dweight = (dy * n.to(x.dtype)).flatten(0, -2).sum(0, dtype=wide).to(weight.dtype)
    g = (dy * weight).to(wide)
    dx = rstd.unsqueeze(-1) * (g - n * (g * n).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight


def add_rms_norm_backward(
    dy: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweight = rms_norm_backward(dy, total, weight, rstd)
    return dx + dsum, dweight


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd derives from nn.LayerNorm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g = dy.to(wide)
    n = (x.to(wide) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dweight, dbias = ((term).flatten(0, -2).sum(0).to(weight.dtype) for term in (g * n, g))
    g = g * weight.to(wide)
    dx = rstd.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight, dbias


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd derives from Mamba-2's norm, rms_norm(x * silu(gate))."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h, z, rstd = x.to(wide), gate.to(wide), rstd.unsqueeze(-1)
    sigmoid = torch.sigmoid(z)
    act, slope = z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    n = h * act * rstd
    dweight = (dy.to(wide) * n).flatten(0, -2).sum(0).to(weight.dtype)
    g = dy.to(wide) * weight.to(wide)
    dh = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    return (dh * act).to(x.dtype), (dh * h * slope).to(gate.dtype), dweight


def builtin(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """F.rms_norm's own backward, where there is one for the device."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm_backward(
        dy, x, [x.shape[-1]], rstd.unsqueeze(-1), weight, [True, True]
    )
    return found


# --- Infuse's operators, as the rewrite leaves them to the compiler ---------------------------------------------------


def rms_norm_operator(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.infuse.rms_norm_bwd(dy, x, weight, rstd, 0.0, True)  # type: ignore[no-any-return]


def add_rms_norm_operator(
    dy: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.ops.infuse.add_rms_norm_bwd(dy, dsum, total, weight, rstd, 0.0, True)  # type: ignore[no-any-return]


def layer_norm_operator(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.infuse.layer_norm_bwd(dy, x, weight, bias, mean, rstd, 0.0, False)  # type: ignore[no-any-return]


def gated_rms_norm_operator(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    flags = (False, "silu", 1, False, False)
    return torch.ops.infuse.gated_rms_norm_bwd(dy, x, gate, weight, rstd.unsqueeze(-1), *flags)  # type: ignore[no-any-return]


def kernel(operator: Function) -> Impl:
    """The operator outside a compiler: the kernel with the launcher's own choice of configuration."""

    def prepare() -> Function:
        missing = optional("infuse.ops.library").missing(torch.device("cuda"))
        if missing:
            raise Unavailable(missing)
        return operator

    return Impl("infuse-kernel", prepare, note="the operator, not compiled")


def competitors(formula: Function, operator: Function, modes: Modes) -> list[Impl]:
    """Stock compiles the formula, Infuse the operator, which its rewrite of the forward leaves in the backward."""
    impls = []
    for suffix, mode in modes:
        impls.append(compiled(formula, "compile" + suffix, mode=mode))
        impls.append(compiled(operator, "infuse" + suffix, backend="infuse", mode=mode))
    return impls


# --- Liger ------------------------------------------------------------------------------------------------------------


def _liger_launch(dim: int) -> tuple[int, int]:
    settings: tuple[int, int] = optional("liger_kernel.ops.utils").calculate_settings(dim)
    return settings


def liger_rms_norm() -> Function:
    backward = optional("liger_kernel.ops.rms_norm").rms_norm_backward

    def run(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Any:
        flat = x.view(-1, x.shape[-1])
        return backward(dy, flat, weight, rstd.flatten(), 0.0, 0, *_liger_launch(x.shape[-1]), False, False)

    return run


def liger_add_rms_norm() -> Function:
    backward = optional("liger_kernel.ops.fused_add_rms_norm").fused_add_rms_norm_backward
    # Its versions differ in this parameter; 2 is what Liger's own forward hands on.
    names = {"num_stages": 2} if "num_stages" in inspect.signature(backward).parameters else {}

    def run(dy: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor) -> Any:
        launch = _liger_launch(total.shape[-1])
        dx, _, dweight = backward(dy, dsum, total, weight, rstd, 0.0, 0, *launch, in_place=False, **names)
        return dx, dweight

    return run


def liger_layer_norm() -> Function:
    backward = optional("liger_kernel.ops.layer_norm").layer_norm_backward

    def run(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Any:
        return backward(dy, x, weight, bias, mean, rstd)

    return run


# --- cases ------------------------------------------------------------------------------------------------------------


def rstd_of(x: Tensor) -> Tensor:
    return torch.rsqrt(x.float().square().mean(-1) + EPS)


def rms_norm_case(shape: Sequence[int], dtype: torch.dtype, on_gpu: bool, modes: Modes) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        dy, x = random(g, dtype, *shape), random(g, dtype, *shape)
        return dy, x, norm_weight(g, dtype, shape[-1]), rstd_of(x)

    impls = [eager(rms_norm_backward, "eager-handwritten"), *competitors(rms_norm_backward, rms_norm_operator, modes)]
    if on_gpu:
        impls += [eager(builtin), kernel(rms_norm_operator), Impl("liger", liger_rms_norm)]
    name = "rms_norm backward " + "x".join(map(str, shape))
    return alone(name, shape, dtype, 3, inputs, rms_norm_backward, impls)


def add_rms_norm_case(shape: Sequence[int], dtype: torch.dtype, on_gpu: bool, modes: Modes) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        dy, dsum, total = (random(g, dtype, *shape) for _ in range(3))
        return dy, dsum, total, norm_weight(g, dtype, shape[-1]), rstd_of(total)

    impls = [eager(add_rms_norm_backward), *competitors(add_rms_norm_backward, add_rms_norm_operator, modes)]
    if on_gpu:
        impls += [kernel(add_rms_norm_operator), Impl("liger", liger_add_rms_norm)]
    name = "add + rms_norm backward " + "x".join(map(str, shape))
    return alone(name, shape, dtype, 4, inputs, add_rms_norm_backward, impls)


def layer_norm_case(shape: Sequence[int], dtype: torch.dtype, on_gpu: bool) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        dy, x = random(g, dtype, *shape), random(g, dtype, *shape)
        weight, bias = norm_weight(g, dtype, shape[-1]), random(g, dtype, shape[-1])
        mean, variance = x.float().mean(-1), x.float().var(-1, correction=0)
        return dy, x, weight, bias, mean, torch.rsqrt(variance + EPS)

    impls = [eager(layer_norm_backward), *competitors(layer_norm_backward, layer_norm_operator, DEFAULT)]
    if on_gpu:
        impls += [kernel(layer_norm_operator), Impl("liger", liger_layer_norm)]
    name = "layer_norm backward " + "x".join(map(str, shape))
    return alone(name, shape, dtype, 3, inputs, layer_norm_backward, impls)


def gated_rms_norm_case(shape: Sequence[int], dtype: torch.dtype, on_gpu: bool) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        dy, x, gate = (random(g, dtype, *shape) for _ in range(3))
        return dy, x, gate, norm_weight(g, dtype, shape[-1]), rstd_of(x.float() * F.silu(gate.float()))

    operator = gated_rms_norm_operator
    impls = [eager(gated_rms_norm_backward), *competitors(gated_rms_norm_backward, operator, DEFAULT)]
    if on_gpu:
        impls.append(kernel(operator))
    name = "gated rms_norm backward " + "x".join(map(str, shape))
    return alone(name, shape, dtype, 5, inputs, gated_rms_norm_backward, impls)


def alone(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    tensors: int,
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]],
    function: Function,
    impls: Sequence[Impl],
) -> Case:
    numel = math.prod(shape)
    return Case(
        name=name,
        inputs=inputs,
        eager=function,
        reference=function,
        impls=impls,
        bytes=(tensors * numel + 2 * shape[-1]) * dtype.itemsize + 4 * numel // shape[-1],
        flops=12 * numel,
        dtype=dtype,
    )


def norm_and_projection(x: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    return F.linear(hugging_face(x, weight), projection)


def norm_and_projections(x: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """As around attention: the gradient of y is the sum of three products, and x goes on as the residual."""
    q, k, v, back = projection.chunk(4)
    y = hugging_face(x, weight)
    return x + F.linear(F.linear(y, q) * torch.sigmoid(F.linear(y, k)) * F.linear(y, v), back.t())


def residual_block(x: Tensor, residual: Tensor, weight: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """As between two parts of a decoder layer: the sum goes on beside its norm's projection."""
    y, total = add_norm(x, residual, weight)
    return F.linear(y, projection), total


def with_gradients(function: Function, num_inputs: int) -> Function:
    """The gradients of the first inputs, for those of the results, which are the remaining arguments."""

    def step(*args: Tensor) -> Any:
        inputs = [arg.detach().requires_grad_() for arg in args[:num_inputs]]
        out = function(*inputs)
        outputs = (out,) if isinstance(out, Tensor) else tuple(out)
        return torch.autograd.grad(outputs, inputs, args[num_inputs:])

    return step


def training_case(name: str, function: Function, shape: Sequence[int], dtype: torch.dtype, outputs: int) -> Case:
    """Forward and backward of x [, residual], weight, projection."""
    numel, dim = math.prod(shape), shape[-1]
    num_inputs = outputs + 2

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        tensors = [random(g, dtype, *shape) for _ in range(outputs)]
        douts = [random(g, dtype, *shape) for _ in range(outputs)]
        return *tensors, norm_weight(g, dtype, dim), random(g, dtype, dim, dim, scale=dim**-0.5), *douts

    def training(impl: Impl) -> Impl:
        return replace(impl, prepare=lambda: with_gradients(impl.prepare(), num_inputs), capture=True)

    step = with_gradients(function, num_inputs)
    return Case(
        name=name + " " + "x".join(map(str, shape)),
        inputs=inputs,
        eager=step,
        reference=step,
        impls=[eager(step), *map(training, compiled_pairs(function, MODES[0]))],
        bytes=(6 * numel + 3 * dim * dim) * dtype.itemsize,
        flops=6 * numel * dim,
        dtype=dtype,
        grad=True,
    )


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if quick:
        shapes, trained = [(64, 256), (4, 8, 32)], (64, 128)
    elif on_gpu:
        shapes, trained = [(16384, 4096), (65536, 896), (8192, 16384), (8192, 32, 128), (512, 4096)], (16384, 4096)
    else:
        shapes, trained = [(4096, 1024), (512, 8, 64)], (4096, 512)
    for shape in shapes:
        yield rms_norm_case(shape, dtype, on_gpu, MODES if shape in shapes[:3] else DEFAULT)
    for shape in shapes[:3]:
        yield add_rms_norm_case(shape, dtype, on_gpu, MODES if shape == shapes[0] else DEFAULT)
    for shape in shapes[:2]:
        yield layer_norm_case(shape, dtype, on_gpu)
    for shape in [(16384, 4096), (8192, 8192)] if on_gpu and not quick else shapes[:1]:
        yield gated_rms_norm_case(shape, dtype, on_gpu)
    yield training_case("train rms_norm + linear", norm_and_projection, trained, dtype, 1)
    batched = (4, trained[0] // 4, trained[1])
    for shape in (batched, trained):  # without a batch Inductor may add to a product in its own call
        yield training_case("train rms_norm + 3 linears", norm_and_projections, shape, dtype, 1)
    yield training_case("train add + rms_norm + linear", residual_block, trained, dtype, 2)


if __name__ == "__main__":
    raise SystemExit(main("norm_backward", __doc__, cases))
