"""What holds for every component: it trains in each dtype, its sites are found, and compiled it is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infuse import testing
from tests.models.mahia.components import CASES, COMPILED, Case, Together, assert_compiled_trains_right
from tests.tolerances import error, rounding

DTYPES = (torch.float32, torch.bfloat16)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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


@each_case
def test_autocast_trains_float32_parameters_near_float32(case: Case) -> None:
    module, inputs = case.module(), case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*inputs)
    out.float().square().sum().backward()
    for name, parameter in case.parameters(module).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    exact = module(*inputs)
    # Some dozen roundings to bf16 one after the other, in the worst case all to one side.
    assert error(out, exact) < 24 * rounding(torch.bfloat16)


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


def test_compiled_training_is_as_near_to_float64_as_eager() -> None:
    cases = [CASES[name] for name in COMPILED]
    model, inputs = Together(cases), [case.inputs(grad=True) for case in cases]
    assert_compiled_trains_right(model, inputs)
