"""infuse::gated_rms_norm against float64, its registration, and what it refuses."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import infuse
from tests.ops.test_norms import DTYPES, OPS, assert_same_layouts, strided
from tests.tolerances import assert_close_to_fp64

# (norm_before_gate, activation, groups, cast_before_weight, cast_before_gate)
FLAGS = {
    "gate first": (False, "silu", 1, False, False),
    "mamba-2": (False, "silu", 4, True, False),
    "sigmoid first": (False, "sigmoid", 2, False, False),
    "norm first": (True, "silu", 1, False, False),
    "qwen3-next": (True, "silu", 1, True, False),
    "rounded before the gate": (True, "sigmoid", 1, False, True),
    "norm in groups": (True, "silu", 4, True, True),
}
D = 16


def inputs(*shape: int, dtype: torch.dtype, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x and gate [..., D], weight [D]"""
    tensors = torch.randn(*shape, D), torch.randn(*shape, D), torch.randn(D)
    return tuple(t.to(dtype).requires_grad_(grad) for t in tensors)  # type: ignore[return-value]


def hand_written(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_first: bool, activation: str, groups: int, *casts: bool
) -> Tensor:
    """As models spell it; in float64 the reference."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    act = F.silu(gate.to(wide)) if activation == "silu" else torch.sigmoid(gate.to(wide))
    h = x.to(wide) if norm_first else x.to(wide) * act
    parts = h.view(*h.shape[:-1], groups, h.shape[-1] // groups)
    n = (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)).view(h.shape)
    y = weight * n.to(x.dtype) if casts[0] else weight.to(wide) * n
    if not norm_first:
        return y.to(x.dtype)
    return ((y.to(x.dtype) if casts[1] else y) * act).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_values_and_gradients_are_as_near_to_float64_as_eager(
    shape: tuple[int, ...], flags: tuple[Any, ...], dtype: torch.dtype
) -> None:
    given = inputs(*shape, dtype=dtype, grad=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    dy = torch.randn(*shape, D).to(dtype)

    def results(function: Any, *tensors: Tensor) -> list[Tensor]:
        y = function(*tensors, 1e-5, *flags)
        return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    exact = results(hand_written, *wide)
    for function in (OPS.gated_rms_norm, OPS.gated_rms_norm.inline):
        for mine, theirs, reference in zip(results(function, *given), results(hand_written, *given), exact):
            assert_close_to_fp64(mine, theirs, reference)


def test_without_weight() -> None:
    x, gate, _ = inputs(3, dtype=torch.float32)
    got = infuse.gated_rms_norm(x, gate, norm_before_gate=True)
    torch.testing.assert_close(got, infuse.rms_norm(x) * F.silu(gate))
    got = infuse.gated_rms_norm(x, gate, norm_before_gate=False, activation="sigmoid", groups=2)
    parts = infuse.rms_norm((x * torch.sigmoid(gate)).view(3, 2, -1))
    torch.testing.assert_close(got, parts.view(3, D))


def test_other_dtypes_beside_x() -> None:
    x, gate, weight = inputs(3, dtype=torch.bfloat16, grad=True)
    gate, weight = gate.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    for norm_first, cast, expected in itertools.product((False, True), (False, True), (None,)):
        y = OPS.gated_rms_norm(x, gate, weight, 1e-5, norm_first, "silu", 1, cast, False)
        assert expected is None and y.dtype == (torch.float32 if cast and not norm_first else torch.bfloat16)
        grads = torch.autograd.grad(y.float().square().sum(), (x, gate, weight))
        assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_gradients_are_right_in_float64(flags: tuple[Any, ...]) -> None:
    given = inputs(3, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *a: OPS.gated_rms_norm(*a, 1e-3, *flags), given)
    check = functools.partial(torch.autograd.gradgradcheck, fast_mode=True)
    assert check(lambda *a: OPS.gated_rms_norm(*a, 1e-3, *flags), given)


@pytest.mark.parametrize("name", ["mamba-2", "qwen3-next", "rounded before the gate"])
def test_opcheck(name: str) -> None:
    x, gate, weight = inputs(3, 4, dtype=torch.bfloat16, grad=True)
    opcheck(OPS.gated_rms_norm.default, (x, gate, weight, 1e-5, *FLAGS[name]))
    opcheck(OPS.gated_rms_norm.default, (x, gate, None, 1e-5, *FLAGS[name]))


def test_strides_are_those_of_the_fakes() -> None:
    x, gate, dy = (strided(3, 4, D) for _ in range(3))
    weight, rstd = torch.randn(2 * D)[::2], strided(3, 4, 4)
    for flags in (FLAGS["mamba-2"], (True, "silu", 4, False, True)):
        assert_same_layouts(
            [
                (OPS.gated_rms_norm, (x, gate, weight, 1e-5, *flags)),
                (OPS.gated_rms_norm_fwd, (x, gate, None, 1e-5, *flags)),
                (OPS.gated_rms_norm_bwd, (dy, x, gate, weight, rstd, *flags)),
                (OPS.gated_rms_norm_bwd, (dy, x, gate, None, rstd, *flags)),
            ]
        )


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"gate": torch.ones(3, 4)}, ValueError, ["gate", "got 4", "expected 8"]),
        ({"gate": torch.ones(3, 8, dtype=torch.int64)}, TypeError, ["gate", "torch.int64"]),
        ({"weight": torch.ones(5)}, ValueError, ["weight", "got 5"]),
        ({"activation": "gelu"}, ValueError, ["activation", "'gelu'", "silu"]),
        ({"groups": 3}, ValueError, ["3 groups", "got 2"]),
        ({"groups": 0}, ValueError, ["groups", "got 0"]),
    ],
)
def test_wrong_arguments_name_what_was_got_and_expected(change: dict[str, Any], kind: Any, words: list[str]) -> None:
    arguments = {"x": torch.ones(3, 8), "gate": torch.ones(3, 8), "norm_before_gate": True, **change}
    with pytest.raises(kind) as raised:
        infuse.gated_rms_norm(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value
