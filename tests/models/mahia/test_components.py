"""What holds for every component: it trains in each dtype, its sites are found, and compiled it is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infuse import testing
from tests.models.mahia.components import CASES, COMPILED, Case
from tests.tolerances import assert_close_to_fp64

DTYPES = (torch.float32, torch.bfloat16)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_compiled = pytest.mark.parametrize("case", [CASES[name] for name in COMPILED], ids=COMPILED)


def widened(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for value in values
    )


def results(case: Case, module: nn.Module, call: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it with respect to floating-point inputs and parameters."""
    out = call(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    wanted = [*(value for value in inputs if value.requires_grad), *case.parameters(module).values()]
    return [out, *torch.autograd.grad((out.double() * weights).sum(), wanted)]


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_parameter_gets_a_gradient(case: Case, dtype: torch.dtype) -> None:
    module, inputs = case.module(dtype), case.inputs(dtype)
    out = module(*inputs)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for name, parameter in case.parameters(module).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].unread])
def test_what_the_forward_does_not_read_is_named(name: str) -> None:
    module = CASES[name].module()
    module(*CASES[name].inputs()).sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == list(CASES[name].unread)


@each_case
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    module, inputs = case.module(torch.float64), case.inputs(torch.float64, grad=case.shapes != ((),))
    names = [name for name, parameter in case.parameters(module).items() if parameter.numel() <= 64]
    small = [module.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(*values: Tensor) -> Tensor:
        arguments, parameters = values[: len(inputs)], values[len(inputs) :]
        out: Tensor = torch.func.functional_call(module, dict(zip(names, parameters)), arguments)
        return out

    assert torch.autograd.gradcheck(run, (*inputs, *small), fast_mode=True)


@each_case
@pytest.mark.parametrize(("dtype", "training"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_every_site_is_found(case: Case, dtype: torch.dtype, training: bool) -> None:
    testing.assert_rewrites(case.module(dtype), case.inputs(dtype), expect=case.sites, refused={}, training=training)


@each_compiled
def test_compiled_inference_is_as_near_to_float64_as_eager(case: Case) -> None:
    module, inputs = case.module(torch.bfloat16).eval(), case.inputs(torch.bfloat16)
    compiled = torch.compile(module, backend="infuse", fullgraph=True)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(*widened(inputs))
        assert_close_to_fp64(compiled(*inputs), module(*inputs), exact)


@each_compiled
def test_compiled_training_is_as_near_to_float64_as_eager(case: Case) -> None:
    module, inputs = case.module(), case.inputs(grad=case.shapes != ((),))
    wide = copy.deepcopy(module).double()
    compiled = torch.compile(module, backend="infuse", fullgraph=True)
    exact = results(case, wide, wide, widened(inputs))
    names = ["output", *(f"input {i}" for i, value in enumerate(inputs) if value.requires_grad)]
    names += case.parameters(module)
    found = zip(
        names, results(case, module, compiled, inputs), results(case, module, module, inputs), exact, strict=True
    )
    for name, got, eager, reference in found:
        try:
            assert_close_to_fp64(got, eager, reference)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
