"""Programs drawn by hypothesis: choosing their steps, tracing them into a pre-grad graph, and checking the rewrite.

They are traced with torch.fx and propagated on fake tensors, which gives the nodes that Dynamo gives (functions,
methods and operators by the author's name) at a hundredth of the cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import assume, note
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from infuse.patterns.passes import rewrite
from infuse.report import Placement
from infuse.settings import Settings
from tests.patterns.capture import Captured, results, results_in_float64
from tests.tolerances import error, rounding

Program = Callable[..., tuple[Any, ...]]
Case = tuple[Program, list[Tensor]]
T = TypeVar("T")

# One wrong step in so many, so that a program of ten steps is right as often as not.
_WRONG = 16


class Choices:
    """Draws the steps of a program. right: the author's spellings. wrong: what makes it something else."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def __call__(self, *right: T, wrong: Sequence[T] = ()) -> T:
        steps = right if not wrong or self._draw(st.integers(1, _WRONG)) < _WRONG else wrong
        return self._draw(st.sampled_from(list(steps)))  # type: ignore[no-any-return]

    def several(self, most: int, *right: T, wrong: Sequence[T] = ()) -> list[T]:
        """Up to `most` steps."""
        return [self(*right, wrong=wrong) for _ in range(self._draw(st.integers(0, most)))]

    def seldom(self, one_in: int = 8) -> bool:
        return bool(self._draw(st.integers(1, one_in)) == one_in)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self._draw(st.integers(0, 7)))
        return torch.randn(shape, generator=generator).to(dtype)


def trace(program: Program, inputs: Sequence[Tensor], training: bool) -> torch.fx.GraphModule:
    """The program as a graph whose nodes have example values."""
    names = ", ".join(f"x{index}" for index in range(len(inputs)))
    scope: dict[str, Any] = {"program": program}
    exec(f"def traced({names}):\n    return program({names})", scope)  # torch.fx reads the parameters' names
    graph = torch.fx.Tracer().trace(scope["traced"])
    module = torch.fx.GraphModule({}, graph)
    mode = FakeTensorMode()
    with torch.set_grad_enabled(training):
        _Propagate(module, mode).propagate(*inputs)
    return module


class _Propagate(FakeTensorProp):
    def run_node(self, n: torch.fx.Node) -> Any:
        result = torch.fx.Interpreter.run_node(self, n)
        n.meta["example_value"] = result
        return result


def _runs(program: Program, inputs: Sequence[Tensor], training: bool) -> bool:
    """Whether the program runs, and can be differentiated in spite of its writes."""
    leaves = [value.detach().clone().requires_grad_(value.requires_grad) for value in inputs]
    try:
        with torch.set_grad_enabled(training):
            outputs = program(*leaves)
            if training:
                sum(output.double().sum() for output in outputs if output.requires_grad).backward()  # type: ignore[union-attr]
    except (RuntimeError, ValueError, IndexError, AttributeError):
        return False
    return True


def rewritten(case: Case, training: bool, place: Callable[..., Placement]) -> Captured:
    """The program traced and rewritten. place: as what."""
    program, inputs = case
    inputs = [value.requires_grad_(training and value.is_floating_point()) for value in inputs]
    assume(_runs(program, inputs, training))
    original = trace(program, inputs, training)
    module = copy.deepcopy(original)
    with torch.set_grad_enabled(training):
        records = rewrite(module.graph, Settings(), place, training)
    module.graph.lint()
    module.recompile()
    return Captured(original, module, records, tuple(inputs), [])


def check(captured: Captured, training: bool) -> None:
    """Outputs and gradients as near to float64 as the source's, NaN where the source has NaN.

    A NaN reaches other gradients by other ways; where an output has one, outputs alone are compared.
    """
    note(captured.original.code)
    note(captured.rewritten.code)
    outputs = captured.original(*(value.detach().clone() for value in captured.inputs))
    training = training and not any(bool(output.isnan().any()) for output in outputs)
    old_values = results(captured.original, captured.inputs, training)
    try:
        new_values = results(captured.rewritten, captured.inputs, training)
        references = results_in_float64(captured, training)
    except RuntimeError as error:
        # The source copied a tensor before it wrote to it, which the rewrite saw through. AOTAutograd turns the write
        # into a copy of its own; eager autograd refuses.
        assume("modified by an inplace operation" not in str(error))
        raise
    for old, new, reference in zip(old_values, new_values, references, strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert torch.equal(new.isnan(), old.isnan()), "NaN in other places than the source's"
        if not old.is_floating_point():
            assert torch.equal(new, old)
            continue
        sound = old.isfinite() & reference.isfinite()
        _assert_near(new[sound], old[sound], reference[sound])


def _assert_near(new: Tensor, old: Tensor, reference: Tensor) -> None:
    """As near as the source is, with room for two independent draws of rounding errors among thousands of programs."""
    granted = rounding(new.dtype) * (256 if new.dtype in (torch.float32, torch.float64) else 4)
    # A sum that cancels has the error of its terms: 1 is the size of every program's inputs.
    new, reference = new.detach().double(), reference.detach().double()
    actual = float((new - reference).norm())
    bound = max(4 * error(old, reference), granted) * max(float(reference.norm()), float(new.numel()) ** 0.5)
    assert actual <= bound, f"error against float64: got {actual:.3g}, expected at most {bound:.3g}"
