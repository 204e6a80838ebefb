"""The forms of the norms that have CUDA kernels, and how far a kernel's answer may be from float64."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Form:
    """An operator with its dtypes. weight, bias: None without. flags: what follows eps in the operator's arguments."""

    op: str
    x: torch.dtype
    weight: torch.dtype | None
    bias: torch.dtype | None
    flags: tuple[Any, ...]

    @property
    def module(self) -> Any:
        return importlib.import_module(f"infuse.ops.{self.op}")

    @property
    def has_operand(self) -> bool:
        return self.op.startswith(("add_", "gated_"))

    @property
    def groups(self) -> int:
        return int(self.flags[2]) if self.op == "gated_rms_norm" else 1

    def vectors(self, dim: int, device: str = "cuda") -> list[Tensor | None]:
        """A random weight, and a bias where the operator has one."""
        dtypes = [self.weight, self.bias] if "layer" in self.op else [self.weight]
        return [None if dtype is None else torch.randn(dim, device=device).to(dtype) for dtype in dtypes]

    def arguments(self, x: Tensor, operand: Tensor | None, vectors: list[Tensor | None]) -> list[Any]:
        """Of the operator's forward."""
        return [x, *([operand] if self.has_operand else []), *vectors, EPS, *self.flags]

    def eager(self, *tensors: Any) -> tuple[Tensor, ...]:
        """All results of the formula in plain torch: y, then sum, mean, rstd as far as the operator has them."""
        results: tuple[Tensor, ...] = getattr(self.module, f"{self.op}_fwd_ref")(*self.arguments(*tensors))
        return results

    def empty_results(self, *tensors: Any) -> list[Tensor]:
        """Room for all results, filled with NaN."""
        results = getattr(self.module, f"{self.op}_fwd_fake")(*self.arguments(*tensors))
        return [result.fill_(float("nan")) for result in results]

    def kernel(self, x: Tensor, operand: Tensor | None, vectors: list[Tensor | None], config: int) -> list[Tensor]:
        """All results of the kernel."""
        results = self.empty_results(x, operand, vectors)
        self.launch(x, operand, vectors, config, results)
        return results

    def launch(
        self, x: Tensor, operand: Tensor | None, vectors: list[Tensor | None], config: int, results: list[Tensor]
    ) -> None:
        arguments = self.arguments(x, operand, vectors)
        if self.op == "gated_rms_norm":  # norm_before_gate, activation, ..
            arguments[-4] = arguments[-4] == "silu"
        getattr(torch.ops.infuse, f"{self.op}_out")(*arguments, config, *results)


def _forms() -> dict[str, Form]:
    rms = {"": (0.0, False, False), ", cast first": (0.0, True, False), ", offset": (1.0, False, False)}
    layer = {"": (0.0, False), ", cast first": (0.0, True), ", offset": (1.0, False)}
    forms = {}
    for x, name in ((BF16, "bf16"), (FP16, "fp16"), (FP32, "fp32")):
        for weight in (x, FP32) if x != FP32 else (x,):
            dtypes = name + (", fp32 weight" if weight != x else "")
            for flag, flags in rms.items():
                forms[f"rms_norm {dtypes}{flag}"] = Form("rms_norm", x, weight, None, flags)
                forms[f"add_rms_norm {dtypes}{flag}"] = Form("add_rms_norm", x, weight, None, flags)
            for flag, chosen in layer.items():
                forms[f"layer_norm {dtypes}{flag}"] = Form("layer_norm", x, weight, weight, chosen)
                forms[f"add_layer_norm {dtypes}{flag}"] = Form("add_layer_norm", x, weight, weight, chosen)
            for flag, before in ((", gate behind", True), (", gate in front", False)):
                for cast in (False, True):
                    title = f"gated_rms_norm {dtypes}{flag}" + (", casts" if cast else "")
                    chosen = (before, "sigmoid" if cast else "silu", 1, cast, cast and before)
                    forms[title] = Form("gated_rms_norm", x, weight, None, chosen)
        forms[f"rms_norm {name}, eps as minimum"] = Form("rms_norm", x, None, None, (0.0, False, True))
        forms[f"layer_norm {name}, nothing"] = Form("layer_norm", x, None, None, layer[""])
        forms[f"layer_norm {name}, bias"] = Form("layer_norm", x, None, x, layer[", cast first"])
        forms[f"add_layer_norm {name}, weight"] = Form("add_layer_norm", x, x, None, layer[""])
    return forms


FORMS = _forms()
# One of each kernel's template, and of each formula.
FEW = (
    "rms_norm bf16",
    "rms_norm fp32, cast first",
    "layer_norm bf16, cast first",
    "layer_norm fp16, fp32 weight",
    "add_rms_norm bf16, fp32 weight, cast first",
    "add_layer_norm fp32",
    "gated_rms_norm bf16, gate behind, casts",
    "gated_rms_norm fp16, gate in front",
)


def in_double(form: Form, x: Tensor, operand: Tensor | None, vectors: list[Tensor | None]) -> tuple[Tensor, ...]:
    """The formula in float64, of the sum as it is rounded to x's dtype."""
    wide = [None if tensor is None else tensor.double() for tensor in vectors]
    if form.op.startswith("add_") and operand is not None:
        x = x + operand
        return form.eager(x.double(), torch.zeros_like(x, dtype=torch.float64), wide)
    return form.eager(x.double(), None if operand is None else operand.double(), wide)


def _terms(form: Form, reference: tuple[Tensor, ...], vectors: list[Tensor | None], x: Tensor) -> Tensor:
    """The size of what y is a sum of, to which rounding is relative; a mean's own error is that of all its terms."""
    if "layer" not in form.op:
        return reference[0].abs()
    rstd = reference[-1].unsqueeze(-1)
    weight, bias = vectors
    scale = 1.0 if weight is None else (weight.double() + form.flags[0]).abs()
    size = x.double().abs()
    return (size + size.mean(-1, keepdim=True)) * rstd * scale + (0.0 if bias is None else bias.double().abs())


def assert_as_good_as_eager(
    got: list[Tensor], form: Form, x: Tensor, operand: Tensor | None, vectors: list[Tensor | None]
) -> None:
    """Every element is within twice the eager computation's largest error in its row, and one ulp, of the fp64 result.

    Kernel and eager round at the same places and differ in the order of the sums, and in how exp is computed. One ulp
    is granted because the eager row may be exact by luck, two where several casts may each fall to the other side; in
    fp32 eight, for the sums, the addition of eps, the two of rsqrt, the division and the exponential. The sum is exact.
    """
    eager, reference = form.eager(x, operand, vectors), in_double(form, x, operand, vectors)
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in eager]
    if form.op.startswith("add_"):
        assert torch.equal(got[1], eager[1])
        x = eager[1]
    tiny = torch.finfo(x.dtype).tiny
    scale = _terms(form, reference, vectors, x) + (tiny if x.dtype != FP16 else 2**-14)
    # Of x: the casts round to it also when the output is wider.
    granted = torch.finfo(x.dtype).eps * (8 if x.dtype == FP32 else 2 if True in form.flags[1:] else 1)
    relative_eager = ((eager[0].double() - reference[0]).abs() / scale).amax(-1, keepdim=True)
    relative = (got[0].double() - reference[0]).abs() / scale
    excess = relative - (2 * relative_eager + granted)
    assert bool((excess <= 0).all()), f"relative error {relative.max():.3g}, eager's {relative_eager.max():.3g}"
    torch.testing.assert_close(got[-1].double(), reference[-1], rtol=1e-5, atol=0)
    if "layer" in form.op:
        rounding = 4 * torch.finfo(FP32).eps * x.double().abs().amax(-1)
        assert bool(((got[-2].double() - reference[-2]).abs() <= rounding).all())
