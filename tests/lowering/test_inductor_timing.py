"""What candidates are called with while they are timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from infuse.lowering.inductor_timing import ColdInputs


@pytest.fixture(autouse=True)
def cache_of_one_kilobyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1024))


def test_weights_take_turns_until_they_fill_the_cache_twice() -> None:
    x, weight = torch.randn(4), torch.randn(32, 8)[:, 1:5].t()
    weight = weight.as_strided((4, 25), (1, 8))
    turns = ColdInputs({1}).of([x, weight])
    assert len(turns) == -(-2048 // 400)
    assert turns[0][1] is weight and all(args[0] is x for args in turns)
    assert len({args[1].data_ptr() for args in turns}) == len(turns)
    for args in turns:
        assert args[1].stride() == weight.stride()
        torch.testing.assert_close(args[1], weight, atol=0, rtol=0)


def test_large_weights_and_activations_are_not_copied() -> None:
    large = torch.randn(1024)
    assert len(ColdInputs({0}).of([large])) == 1
    assert len(ColdInputs(()).of([torch.randn(4)])) == 1


def test_copies_are_few_and_made_once() -> None:
    inputs, args = ColdInputs({0}), [torch.randn(1)]
    turns = inputs.of(args)
    assert len(turns) == 64
    assert inputs.of(args) is turns
    assert inputs.of([torch.randn(1)]) is not turns
