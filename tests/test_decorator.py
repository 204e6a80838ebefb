"""@infuse.fuse on a class, a module and a function."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import infuse
from infuse import backend
from infuse.report import SiteRecord
from tests.small_models import HandWrittenNorm


class Plain(HandWrittenNorm):
    """Not decorated."""


@infuse.fuse
class Fused(HandWrittenNorm):
    """Decorated as a class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@infuse.fuse(patterns=["rms_norm"], dynamic=False)
def fused_function(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rewrites_of(call: object, x: Tensor) -> tuple[Tensor, int]:
    records: list[SiteRecord] = []
    stop = backend.on_rewrite(records.extend)
    with torch.no_grad():
        out = call(x)  # type: ignore[operator]
    stop()
    return out, sum(record.status == "rewritten" for record in records)


def test_a_class_keeps_its_type_and_state_dict() -> None:
    module, plain = Fused(16), Plain(16)
    assert isinstance(module, Fused) and type(module).__name__ == "Fused"
    assert list(module.state_dict()) == list(plain.state_dict()) == ["weight"]
    plain.load_state_dict(module.state_dict())
    x = torch.randn(3, 16)
    out, count = rewrites_of(module, x)
    assert count == 1
    torch.testing.assert_close(out, plain(x))


def test_instances_of_a_class_share_one_compilation() -> None:
    first, second = Fused(16), Fused(16)
    x = torch.randn(3, 16)
    assert rewrites_of(first, x)[1] == 1
    out, count = rewrites_of(second, x)
    assert count == 0
    torch.testing.assert_close(out, HandWrittenNorm.forward(second, x))


def test_a_decorated_module_can_be_copied_and_pickled() -> None:
    module, x = Fused(16), torch.randn(3, 16)
    expected = HandWrittenNorm.forward(module, x)
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(duplicate(x), expected)


def test_an_instance_stays_the_same_object_with_the_same_keys() -> None:
    model = nn.Sequential(Plain(16), nn.Linear(16, 4))
    keys = list(model.state_dict())
    expected = model(torch.ones(2, 16))
    assert infuse.fuse(model[0]) is model[0]
    assert list(model.state_dict()) == keys
    out, count = rewrites_of(model, torch.ones(2, 16))
    assert count == 1
    torch.testing.assert_close(out, expected)


def test_a_function_is_compiled() -> None:
    x = torch.randn(3, 16)
    out, count = rewrites_of(fused_function, x)
    assert count == 1
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (16,), eps=1e-6))


def test_twice_is_once() -> None:
    assert infuse.fuse(Fused) is Fused and infuse.fuse(fused_function) is fused_function
    forward = Fused.forward
    infuse.fuse(Fused)
    assert Fused.forward is forward


def test_gradients_flow() -> None:
    module, x = Fused(16), torch.randn(3, 16, requires_grad=True)
    module(x).square().sum().backward()
    reference = Plain(16)
    reference.load_state_dict(module.state_dict())
    other = x.detach().clone().requires_grad_()
    reference(other).square().sum().backward()
    assert x.grad is not None and module.weight.grad is not None
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(module.weight.grad, reference.weight.grad)


@pytest.mark.parametrize("target", [3, "forward", int])
def test_anything_else_is_refused(target: object) -> None:
    with pytest.raises(TypeError, match="expected an nn.Module class, an nn.Module or a function"):
        infuse.fuse(target)


def test_a_wrong_setting_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="mode: got 'fastest'"):
        infuse.fuse(Plain(4), mode="fastest")
