"""q/k norm + rotary embedding: what the rule proposes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.lowering.policy import place as lowering_place
from infuse.report import Placement
from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture, composite_overload, parameters
from tests.patterns.rope_spellings import full, rotate_every_two, rotate_half, upcast
from tests.patterns.test_rope_models import hugging_face

HEADS, DIM, LENGTH = 3, 8, 5


class Llama(nn.Module):
    """RMSNorm as Hugging Face writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Heads(nn.Module):
    """Projection, norm of each head, rotation. transposed: the heads come before the positions when it rotates."""

    def __init__(self, norm: nn.Module, rope: Callable[..., Tensor], transposed: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, HEADS * DIM, bias=False)
        self.norm, self.rope, self.transposed = norm, rope, transposed
        table = torch.randn(LENGTH, DIM) if transposed else torch.randn(LENGTH, 1, DIM)
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.proj(x).view(*x.shape[:-1], HEADS, DIM))
        return self.rope(q.transpose(1, 2) if self.transposed else q, self.cos, self.sin)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(
    "module",
    [
        Heads(nn.RMSNorm(DIM, eps=1e-6), full(rotate_half)),
        Heads(nn.LayerNorm(DIM), full(rotate_half), transposed=False),
        Heads(nn.LayerNorm(DIM, bias=False), full(rotate_every_two)),
        Heads(Llama(), upcast),
    ],
    ids=["RMSNorm", "LayerNorm", "LayerNorm without bias", "Llama"],
)
def test_norm_and_rotation_are_one_site(module: Heads, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    module = parameters(module, dtype)  # type: ignore[assignment]
    x = torch.randn(2, LENGTH, DIM, dtype=dtype, requires_grad=training)
    captured = capture(module.to(dtype), x, training=training, dynamic=dynamic, place=composite_overload)
    assert captured.counts == {"qk_norm_rope": 1} and captured.refusals == []
    assert_same_results(captured, training)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_models_with_q_and_k_norm(name: str) -> None:
    model = hugging_face(name, {"head_dim": 8}, torch.float32)
    captured = capture(
        lambda tokens: model(tokens).logits,
        torch.randint(1, 32, (2, 8)),
        place=composite_overload,
        settings=Settings(patterns=("rope", "qk_norm_rope")),
    )
    assert captured.counts == {"qk_norm_rope": 4} and captured.refusals == []
    assert_same_results(captured)


@pytest.mark.parametrize("training", [False, True])
def test_lowering_leaves_it_to_its_parts(training: bool) -> None:
    def place(kind: str, args: tuple[object, ...], training: bool) -> Placement:
        return lowering_place(kind, args, training, settings=Settings(), max_autotune=True)

    module = Heads(nn.RMSNorm(DIM, eps=1e-6), full(rotate_half))
    captured = capture(module, torch.randn(2, LENGTH, DIM), training=training, place=place)
    assert captured.counts == {"rms_norm": 1, "rope": 1}
    assert captured.notes == ["qk_norm_rope: left to its parts (no qk_norm_rope kernel: no kernel for cpu)"]


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (DIM,), eps=1e-6)


def norm_is_read_elsewhere(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    y = norm(x)
    return full(rotate_half)(y, table, table + 1), y.exp()


def view_is_read_elsewhere(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    y = norm(x).transpose(0, 1)
    return full(rotate_half)(y, table, table + 1), y.exp()


def scaled_in_between(x: Tensor, table: Tensor) -> Tensor:
    return full(rotate_half)(norm(x) * 2, table, table + 1)


def last_dimension_moves(x: Tensor, table: Tensor) -> Tensor:
    return full(rotate_half)(norm(x).transpose(2, 3), table, table + 1)


def rotated_first(x: Tensor, table: Tensor) -> Tensor:
    return norm(full(rotate_half)(x, table, table + 1))


@pytest.mark.parametrize(
    "function",
    [norm_is_read_elsewhere, view_is_read_elsewhere, scaled_in_between, last_dimension_moves, rotated_first],
)
def test_what_lies_otherwise_stays_two_sites(function: Callable[..., Tensor]) -> None:
    captured = capture(function, torch.randn(2, HEADS, DIM, DIM), torch.randn(DIM, DIM), place=composite_overload)
    assert captured.counts == {"rms_norm": 1, "rope": 1} and captured.refusals == []
    assert_same_results(captured)


def test_a_write_in_between_keeps_them_apart() -> None:
    def written(x: Tensor, table: Tensor) -> Tensor:
        y = norm(x)
        x.mul_(2)
        return full(rotate_half)(y, table, table + 1)

    captured = capture(written, torch.randn(2, HEADS, DIM, DIM), torch.randn(DIM, DIM), place=composite_overload)
    assert captured.counts == {"rms_norm": 1, "rope": 1}
    assert_same_results(captured)
