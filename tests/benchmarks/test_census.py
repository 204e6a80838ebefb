"""The counter counts what was executed: hand-made models whose sites are known, and near misses that hold none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from census.counting import count
from torch import Tensor, nn

torch.manual_seed(0)
X = torch.randn(2, 6, 16)
Q, K, V = (torch.randn(2, 4, 6, 8) for _ in range(3))
W = nn.Parameter(torch.randn(16, 16))
GATE, UP = nn.Linear(16, 24), nn.Linear(16, 24)
PACKED = nn.Linear(16, 48)
COS, SIN = torch.randn(6, 8), torch.randn(6, 8)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 4:], x[..., :4]), -1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def pairs(x: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    c, s = COS[:, ::2], SIN[:, ::2]
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)


def complex_pairs(x: Tensor) -> Tensor:
    frequencies = torch.polar(torch.ones(6, 4), COS[:, :4])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * frequencies).flatten(-2)


def written_softmax(scores: Tensor) -> Tensor:
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def written_in_parts() -> Tensor:
    scores = torch.zeros(2, 4, 6, 6)
    scores[:, :2] = Q[:, :2] @ K[:, :2].mT
    scores[:, 2:] = Q[:, 2:] @ K[:, 2:].mT
    return scores


def sinks(scores: Tensor) -> Tensor:
    column = torch.zeros(4, 1, 1).expand(2, 4, 6, 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


POSITIVE: list[tuple[str, Callable[[], object], dict[str, int]]] = [
    ("a call", lambda: F.scaled_dot_product_attention(Q, K, V, is_causal=True), {"attention": 1}),
    ("two calls", lambda: [F.scaled_dot_product_attention(Q, K, V) for _ in range(2)], {"attention": 2}),
    ("matmul", lambda: ((Q @ K.mT) / 3).softmax(-1) @ V, {"attention": 1}),
    (
        "einsum",
        lambda: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", Q, K).softmax(-1), V),
        {"attention": 1},
    ),
    (
        "mask and cast",
        lambda: (Q @ K.mT + torch.zeros(6, 6)).softmax(-1, torch.float32).to(Q.dtype) @ V,
        {"attention": 1},
    ),
    ("dropout", lambda: F.dropout((Q @ K.mT).softmax(-1), 0.5) @ V, {"attention": 1}),
    ("softcap", lambda: (torch.tanh(Q @ K.mT / 5) * 5).softmax(-1) @ V, {"attention": 1}),
    ("sinks", lambda: sinks(Q @ K.mT) @ V, {"attention": 1}),
    ("written softmax", lambda: written_softmax(Q @ K.mT) @ V, {"attention": 1}),
    ("log softmax", lambda: F.log_softmax(Q @ K.mT, -1).exp() @ V, {"attention": 1}),
    ("memory", lambda: (X @ W.T).softmax(-1) @ W, {"attention": 1}),
    ("multihead", lambda: nn.MultiheadAttention(16, 2).eval()(X, X, X), {"attention": 1}),
    ("multihead in training", lambda: nn.MultiheadAttention(16, 2).train()(X, X, X), {"attention": 1}),
    ("encoder layer", lambda: nn.TransformerEncoderLayer(16, 2, 8).eval()(X), {"attention": 1, "layer_norm": 2}),
    ("encoder layer in training", lambda: nn.TransformerEncoderLayer(16, 2, 8)(X), {"attention": 1, "layer_norm": 2}),
    ("norm", lambda: rms(X), {"rms_norm": 1}),
    ("norm by call", lambda: F.rms_norm(X, (16,), torch.ones(16)), {"rms_norm": 1}),
    ("norm with a cast", lambda: rms(X.bfloat16().float()).bfloat16() * W[0], {"rms_norm": 1}),
    ("norm by root", lambda: X / torch.sqrt((X * X).mean(-1, keepdim=True) + 1e-6), {"rms_norm": 1}),
    ("norm by sum", lambda: X * torch.rsqrt(X.square().sum(-1, keepdim=True) / 16 + 1e-6), {"rms_norm": 1}),
    ("norm by power", lambda: X * (X.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5), {"rms_norm": 1}),
    ("norm with a clamp", lambda: X * X.pow(2).mean(-1, keepdim=True).clamp(min=1e-6).rsqrt(), {"rms_norm": 1}),
    ("norm of a norm", lambda: rms(rms(X) * W[0]) * W[1], {"rms_norm": 2}),
    ("norm weighted first", lambda: (W[0] * X) / torch.sqrt((X * X).mean(-1, keepdim=True) + 1e-6), {"rms_norm": 1}),
    ("layer norm", lambda: F.layer_norm(X, (16,)), {"layer_norm": 1}),
    ("layer norm of rms", lambda: rms(X - X.mean(-1, keepdim=True)), {"layer_norm": 1}),
    (
        "layer norm by var",
        lambda: (X - X.mean(-1, keepdim=True)) / torch.sqrt(X.var(-1, keepdim=True) + 1e-6),
        {"layer_norm": 1},
    ),
    ("layer norm by std", lambda: (X - X.mean(-1, keepdim=True)) / (X.std(-1, keepdim=True) + 1e-6), {"layer_norm": 1}),
    ("silu gate", lambda: F.silu(GATE(X)) * UP(X), {"swiglu": 1}),
    ("other order", lambda: UP(X) * F.gelu(GATE(X), approximate="tanh"), {"swiglu": 1}),
    ("packed", lambda: (lambda a, b: a * F.silu(b))(*PACKED(X).chunk(2, -1)), {"swiglu": 1}),
    ("interleaved", lambda: (lambda y: F.silu(y[..., ::2]) * y[..., 1::2])(PACKED(X)), {"swiglu": 1}),
    ("glu", lambda: F.glu(PACKED(X)), {"swiglu": 1}),
    ("relu squared", lambda: F.relu(GATE(X)).square() * UP(X), {"swiglu": 1}),
    ("silu written out", lambda: (lambda g: g * torch.sigmoid(g) * UP(X))(GATE(X)), {"swiglu": 1}),
    ("rotate half", lambda: [x * COS + rotate_half(x) * SIN for x in (Q, K)], {"rope": 2}),
    ("rotate every two", lambda: Q * COS + rotate_every_two(Q) * SIN, {"rope": 1}),
    ("pairs", lambda: pairs(Q), {"rope": 1}),
    ("complex", lambda: complex_pairs(Q), {"rope": 1}),
    ("scores written in parts", lambda: written_in_parts().softmax(-1) @ V, {"attention": 1}),
    (
        "mask in place",
        lambda: (Q @ K.mT).mul_(0.3).masked_fill_(Q[0, 0, :, :6] > 9, -1e9).softmax(-1) @ V,
        {"attention": 1},
    ),
]

NEGATIVE: list[tuple[str, Callable[[], object]]] = [
    ("router", lambda: (X @ W).softmax(-1).topk(2)),
    ("mixture", lambda: (X @ W)[..., None, :].softmax(-1) @ torch.randn(2, 6, 16, 8)),
    ("linear attention", lambda: (X @ W).softmax(-1) @ ((X @ W).softmax(-2).mT @ X)),
    ("softmax alone", lambda: X.softmax(-1) @ W),
    ("probabilities only", lambda: (Q @ K.mT).softmax(-1)),
    ("L2 norm", lambda: F.normalize(X, dim=-1)),
    ("other axis", lambda: X * torch.rsqrt(X.pow(2).mean(1, keepdim=True) + 1e-6)),
    ("other tensor", lambda: X.sin() * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + 1e-6)),
    ("no root", lambda: X * (X.pow(2).mean(-1, keepdim=True) + 1e-6)),
    ("sum without count", lambda: X * torch.rsqrt(X.square().sum(-1, keepdim=True) + 1e-6)),
    ("batch norm", lambda: nn.BatchNorm1d(6)(X)),
    ("group norm", lambda: nn.GroupNorm(2, 6)(X)),
    ("quick gelu", lambda: (lambda g: g * torch.sigmoid(1.702 * g))(GATE(X))),
    ("gelu written out", lambda: (lambda g: 0.5 * g * (1 + torch.tanh(g + 0.04 * g.pow(3))))(GATE(X))),
    ("no activation", lambda: GATE(X) * UP(X)),
    ("scaled by a weight", lambda: F.silu(GATE(X)) * W[0, 0]),
    ("dropout after an activation", lambda: F.dropout(F.relu(GATE(X)), 0.5)),
    ("no rotation", lambda: Q * COS + K * SIN),
    ("halves swapped, nothing negated", lambda: Q * COS + torch.cat((Q[..., 4:], Q[..., :4]), -1) * SIN),
]


@pytest.mark.parametrize(("call", "expected"), [item[1:] for item in POSITIVE], ids=[item[0] for item in POSITIVE])
def test_sites_are_counted(call: Callable[[], object], expected: dict[str, int]) -> None:
    assert count(call) == expected


@pytest.mark.parametrize("call", [item[1] for item in NEGATIVE], ids=[item[0] for item in NEGATIVE])
def test_near_misses_are_not_counted(call: Callable[[], object]) -> None:
    assert count(call) == {}
