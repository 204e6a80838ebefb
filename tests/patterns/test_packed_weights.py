"""Weights that freezing makes constants: packed in place once, with the same parameters, or left with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infuse
from infuse import backend
from infuse.report import Placement
from tests.patterns.capture import assert_same_results, capture, inline_overload

DIM = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Heads(nn.Module):
    """q, k and v of one input, with and without a bias, behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM, eps=1e-6)
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, 4, bias=False), nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return self.q(y), self.k(y), self.v(y)

    @property
    def weights(self) -> list[Tensor]:
        return [self.q.weight, self.k.weight, self.v.weight]


def packing(kind: str, args: Any, training: bool, **rest: Any) -> Placement:
    if kind == "packed_linear":
        return Placement("parts", "one product")
    return inline_overload(kind, args, training)


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Freezing, which Dynamo reads from the global configuration alone; one product for packed weights."""
    monkeypatch.setattr(backend, "place", packing)
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True, force_disable_caches=True), torch.no_grad():
        yield


def storages(module: Heads) -> set[int]:
    return {weight.untyped_storage().data_ptr() for weight in module.weights}


def compiled(module: nn.Module) -> Callable[..., Any]:
    torch._dynamo.reset()
    infuse.reset_report()
    function: Callable[..., Any] = torch.compile(module, backend="infuse")
    return function


def test_parameters_become_slices_of_one_tensor() -> None:
    module = Heads().eval().to(DEVICE)
    before = copy.deepcopy(module.state_dict())
    parameters = dict(module.named_parameters())
    strides = {name: parameter.stride() for name, parameter in parameters.items()}
    x = torch.randn(3, DIM, device=DEVICE)
    expected = module(x)
    results = compiled(module)(x)
    torch.testing.assert_close(results, expected)
    assert infuse.last_report().larger == {"packed_linear": 1}
    assert len(storages(module)) == 1
    (size,) = {weight.untyped_storage().nbytes() for weight in module.weights}
    assert size == sum(weight.numel() * weight.itemsize for weight in module.weights)
    assert dict(module.named_parameters()) == parameters  # the same objects
    assert {name: parameter.stride() for name, parameter in parameters.items()} == strides
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch counts the memory of CUDA devices alone")
def test_nothing_is_kept_twice() -> None:
    module = Heads().to(DEVICE)
    for name in ("q", "k", "v"):
        setattr(module, name, nn.Linear(DIM, 1 << 20, device=DEVICE, bias=False))
    x = torch.randn(3, DIM, device=DEVICE)
    before = torch.cuda.memory_allocated()
    compiled(module)(x)
    assert infuse.last_report().larger == {"packed_linear": 1}
    assert torch.cuda.memory_allocated() < before + module.k.weight.numel() * module.k.weight.itemsize // 2


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_recorded_graph_reads_the_slices() -> None:
    module = Heads().eval().to(DEVICE)
    function = torch.compile(module, backend="infuse", mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(3, DIM, device=DEVICE)
        torch.testing.assert_close([item.clone() for item in function(x)], list(module(x)))
    assert len(storages(module)) == 1


def test_second_compilation_finds_them_packed() -> None:
    module = Heads().eval().to(DEVICE)
    compiled(module)(torch.randn(3, DIM, device=DEVICE))
    places = [weight.data_ptr() for weight in module.weights]
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()})
    x = torch.randn(5, DIM, device=DEVICE)
    torch.testing.assert_close(compiled(module)(x), module(x))
    assert infuse.last_report().larger == {"packed_linear": 1}
    assert [weight.data_ptr() for weight in module.weights] == places


def test_weights_are_trained_after_that() -> None:
    module = Heads().eval().to(DEVICE)
    x = torch.randn(3, DIM, device=DEVICE)
    assert capture(module, x, place=packing).counts == {"rms_norm": 1, "packed_linear": 1}
    assert len(storages(module)) == 1
    with torch.enable_grad():
        sum(result.sum() for result in module(x)).backward()
    expected = [weight - 0.5 * weight.grad for weight in module.weights if weight.grad is not None]
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    torch.testing.assert_close([weight.detach() for weight in module.weights], expected)


def test_explain_changes_nothing() -> None:
    module = Heads().eval().to(DEVICE)
    assert infuse.explain(module, torch.randn(3, DIM, device=DEVICE)).larger == {"packed_linear": 1}
    assert len(storages(module)) == 3


def gradient(module: Heads) -> None:
    module.q.weight.grad = torch.zeros_like(module.q.weight)


def view(module: Heads) -> None:
    module.k.weight = nn.Parameter(torch.randn(8, DIM, device=DEVICE)[:4])


def transposed(module: Heads) -> None:
    module.k.weight = nn.Parameter(torch.randn(DIM, 4, device=DEVICE).t())


def tied(module: Heads) -> None:
    module.v.weight = module.k.weight


def shared(module: Heads) -> None:
    module.k.weight.share_memory_()


REFUSED: dict[str, tuple[Callable[[Heads], Any], str]] = {
    "state_dict is kept": (lambda module: module.state_dict(), "something else holds a weight's memory"),
    "another parameter of its memory": (lambda m: nn.Parameter(m.q.weight.data), "something else holds"),
    "tied": (tied, "read elsewhere too (tied)"),
    "gradient": (gradient, "a weight has a gradient or a hook"),
    "hook": (lambda m: m.k.weight.requires_grad_().register_hook(lambda grad: grad), "a gradient or a hook"),
    "part of a larger tensor": (view, "part of a larger tensor"),
    "transposed": (transposed, "part of a larger tensor"),
    **({"shared memory": (shared, "shared or mapped memory")} if DEVICE == "cpu" else {}),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_could_notice_is_refused(change: Callable[[Heads], Any], reason: str) -> None:
    module = Heads().eval().to(DEVICE)
    kept = change(module)
    places = [weight.data_ptr() for weight in module.weights]
    captured = capture(module, torch.randn(3, DIM, device=DEVICE), place=packing)
    assert captured.counts == {"rms_norm": 1}
    assert any(note.startswith("packed_linear: left to its parts (") and reason in note for note in captured.notes)
    assert_same_results(captured)
    assert [weight.data_ptr() for weight in module.weights] == places
    del kept


def test_graph_that_was_compiled_before_keeps_its_weights() -> None:
    module = Heads().eval().to(DEVICE)
    first = torch.compile(module, backend="inductor")
    expected = first(torch.ones(3, DIM, device=DEVICE))
    other: Callable[..., Any] = torch.compile(lambda x: module(x), backend="infuse")
    infuse.reset_report()
    torch.testing.assert_close(other(torch.ones(3, DIM, device=DEVICE)), expected)
    assert any("something else holds a weight's memory" in note for note in infuse.last_report().notes)
    assert len(storages(module)) == 3


def test_weights_that_the_graph_is_given_are_not_packed() -> None:
    module = Heads().eval().to(DEVICE)
    with torch._inductor.config.patch(freezing=False):
        capture(module, torch.randn(3, DIM, device=DEVICE), place=packing)
    assert len(storages(module)) == 3


def test_weight_that_is_read_elsewhere_is_left() -> None:
    class Tied(Heads):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return *super().forward(x), F.linear(x.flip(0), self.k.weight)

    module = Tied().eval().to(DEVICE)
    captured = capture(module, torch.randn(3, DIM, device=DEVICE), place=packing)
    assert "packed_linear: left to its parts (a weight is read elsewhere too (tied))" in captured.notes
    assert len(storages(module)) == 3
