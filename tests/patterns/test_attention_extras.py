"""Softcap, sinks, dropout, factors for each row, and softmaxes that are made safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.settings import Settings
from tests.patterns.capture import MODES, Captured, assert_same_results, capture, inline_overload
from tests.patterns.test_attention_call import HEAD, B, H, S, T, tensors

Function = Callable[..., Tensor]


def both(function: Function, *args: Tensor, training: bool, dynamic: bool) -> list[Captured]:
    """Captured with the operator kept whole and with its formula."""
    return [
        capture(function, *args, training=training, dynamic=dynamic),
        capture(function, *args, training=training, dynamic=dynamic, place=inline_overload),
    ]


def gemma2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = scores / 5.0
    scores = torch.tanh(scores)
    scores = scores * 5.0
    scores = scores + torch.where(torch.arange(T, device=q.device) < T - 1, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def softcap_by_a_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 30.0 * ((q @ k.mT).float() * 0.3 * (1.0 / 30.0)).tanh()
    return scores.softmax(-1).type_as(v) @ v


def softcap_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.mT), -1) @ v


def softcap_then_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(1)
    scores = torch.tanh(q @ k.mT * 0.02) * 50.0
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [gemma2, softcap_by_a_product, softcap_of_one, softcap_then_fill])
def test_softcap(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    for captured in both(function, *tensors(dtype, training), training=training, dynamic=dynamic):
        assert captured.refusals == []
        assert captured.counts == {"attention": 1}
        assert "softmax" not in captured.targets()
        assert_same_results(captured, training)


@pytest.mark.parametrize(
    ("function", "scale", "softcap"),
    [(gemma2, 0.3, 5.0), (softcap_by_a_product, 0.3, 30.0), (softcap_of_one, 1.0, 1.0), (softcap_then_fill, 1.0, 50.0)],
)
def test_scale_and_cap_are_the_sources(function: Function, scale: float, softcap: float) -> None:
    args = capture(function, *tensors()).operators()[0].args
    assert args[4] == pytest.approx(scale)
    assert args[6] == pytest.approx(softcap)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    mask = torch.where(torch.ones(S, T, dtype=torch.bool, device=q.device).tril(1), 0.0, torch.finfo(q.dtype).min)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask.to(q.dtype)[None, None]
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    combined = torch.cat([scores, column], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    weights = F.softmax(combined, dim=-1, dtype=combined.dtype)
    weights = weights[..., :-1]
    return torch.matmul(nn.functional.dropout(weights, p=0.0, training=True), v)


def sinks_first(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    weights = torch.cat((column, q @ k.mT * 0.3), -1).softmax(-1)
    return weights[:, :, :, 1:] @ v


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [gpt_oss, sinks_first])
def test_sinks(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    sinks = torch.randn(H, dtype=dtype, requires_grad=training)
    for captured in both(function, *tensors(dtype, training), sinks, training=training, dynamic=dynamic):
        assert captured.refusals == []
        assert captured.counts == {"attention": 1}
        assert captured.operators()[0].args[7].meta["example_value"].dim() == 1  # type: ignore[union-attr]
        assert_same_results(captured, training)


def learned_temperature(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    # Swin v2: cosine attention, with a temperature for each head.
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(t.view(H, 1, 1), max=4.6).exp().to(q.dtype)
    return scores.softmax(dim=-1) @ v


def divided_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / (1.5 + t[0].abs()), -1) @ v


def temperature_and_scale(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, T, device=q.device).to(q.dtype)
    return torch.softmax(t[:, None, None] * (q @ k.mT) * 0.3 + bias, -1) @ v


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [learned_temperature, divided_by_a_tensor, temperature_and_scale])
def test_factor_for_each_row_goes_to_q(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    t = torch.randn(H, dtype=dtype, requires_grad=training)
    for captured in both(function, *tensors(dtype, training), t, training=training, dynamic=dynamic):
        assert captured.refusals == []
        assert captured.counts == {"attention": 1}
        assert_same_results(captured, training)


def test_scale_that_is_a_constant_tensor_is_a_number() -> None:
    def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / torch.full([], HEAD**0.5, dtype=q.dtype, device=q.device)
        return torch.softmax(scores / torch.sqrt(torch.tensor(4.0)), -1) @ v

    captured = capture(divided, *tensors())
    assert captured.operators()[0].args[4] == pytest.approx(HEAD**-0.5 / 2)
    assert_same_results(captured)


def safe_by_nan_to_num(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.softmax((q @ k.mT).masked_fill(~mask, float("-inf")), -1)
    return torch.nan_to_num(weights) @ v


def safe_by_masking_again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.softmax(torch.where(mask, q @ k.mT, float("-inf")), -1)
    return torch.where(mask, weights, 0.0) @ v


def safe_by_the_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(mask.logical_not(), float("-inf"))
    weights = torch.softmax(scores, -1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0.0) @ v


def safe_by_the_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # As torch's own attention does.
    scores = q @ k.mT + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.where(nothing, 0.0, torch.softmax(scores, -1)) @ v


@pytest.mark.parametrize("function", [safe_by_nan_to_num, safe_by_masking_again, safe_by_the_rows, safe_by_the_scores])
def test_safe_softmax_gives_zeros(function: Function) -> None:
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    mask[0, :, 2], mask[..., 3] = False, False
    for captured in both(function, *tensors(), mask, training=False, dynamic=False):
        assert captured.refusals == []
        assert captured.operators()[0].args[8] == "zeros"
        assert_same_results(captured)


def finite_and_nan_to_num(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(~mask, -1e9), -1).nan_to_num(0.0) @ v


def lowest_and_a_test_of_the_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~mask, torch.finfo(q.dtype).min)
    return torch.where((scores == float("-inf")).all(-1, keepdim=True), 0.0, torch.softmax(scores, -1)) @ v


def raised_and_nan_to_num(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~mask, float("-inf")).clamp(min=torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("function", [finite_and_nan_to_num, lowest_and_a_test_of_the_scores, raised_and_nan_to_num])
def test_zeros_for_infinite_rows_leave_finite_ones(function: Function) -> None:
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    mask[0, :, 2], mask[..., 3] = False, False
    for captured in both(function, *tensors(), mask, training=False, dynamic=False):
        assert captured.operators()[0].args[8] == "mean"
        assert_same_results(captured)


def content_and_position(q: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """Conformer's scores."""
    return (q @ k.mT + q @ p.mT) * 0.3


def masked_again_low(q: Tensor, k: Tensor, v: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    scores = content_and_position(q, k, p).masked_fill(~mask, -1e4)
    return torch.softmax(scores, -1).masked_fill(~mask, 0.0) @ v


def masked_again_lowest(q: Tensor, k: Tensor, v: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    scores = content_and_position(q, k, p).masked_fill(~mask, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1).masked_fill(~mask, 0.0) @ v


def masked_again_infinite(q: Tensor, k: Tensor, v: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    scores = content_and_position(q, k, p).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).masked_fill(~mask, 0.0) @ v


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [masked_again_low, masked_again_lowest, masked_again_infinite])
def test_masked_again_beside_a_bias(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    q, k, v = tensors(dtype, training)
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    mask[..., 3] = False
    if function is not masked_again_infinite:
        mask[0, :, 2] = False  # Beyond that, -inf gives NaN gradients.
    inputs = (q, k, v, torch.randn_like(k).requires_grad_(training), mask)
    captured = capture(function, *inputs, training=training, dynamic=dynamic)
    assert captured.refusals == []
    assert captured.operators()[0].args[8] == "zeros"
    assert_same_results(captured, training)


def masked_again_above_infinity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    # A row of -inf in the bias is NaN, and only where the mask is not.
    scores = (q @ k.mT + bias).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1).masked_fill(~mask, 0.0) @ v


def masked_again_above_lower(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    # Beside a bias of -1e9 it is the overwritten keys that get the weight, and lose it.
    scores = (q @ k.mT + bias).masked_fill(~mask, -1e4)
    return torch.softmax(scores, -1).masked_fill(~mask, 0.0) @ v


@pytest.mark.parametrize("function", [masked_again_above_infinity, masked_again_above_lower])
def test_masked_again_beside_an_unknown_bias_is_refused(function: Function) -> None:
    mask = torch.ones(B, 1, S, T, dtype=torch.bool).tril(1)
    captured = capture(function, *tensors(), mask, torch.zeros(S, T))
    assert captured.counts == {}
    assert captured.refusals


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def written_out_with_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(1)
    scores = torch.where(mask, q @ k.mT, torch.finfo(q.dtype).min).float()
    weights = (scores - torch.max(scores, -1, keepdim=True)[0].detach()).exp()
    return (weights / torch.sum(weights, dim=-1, keepdim=True)).to(v.dtype) @ v


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("function", [written_out, written_out_with_a_mask])
def test_softmax_written_out(function: Function, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.refusals == []
    assert captured.counts == {"attention": 1}
    assert "exp" not in captured.targets()
    assert_same_results(captured, training)


def sum_of_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT)
    return (weights / weights.sum(-2, keepdim=True)) @ v


def sum_with_an_epsilon(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def normalised_after_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT)
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("function", [sum_of_another, sum_with_an_epsilon, normalised_after_the_values])
def test_exponentials_that_are_no_softmax_over_keys(function: Function) -> None:
    assert capture(function, *tensors()).counts == {}


def test_a_single_key() -> None:
    for keys in (1, 2):
        q, k, v = tensors(keys=keys, training=True)
        captured = capture(lambda q, k, v: torch.softmax(q @ k.mT * 0.3, -1) @ v, q, k, v, training=True)
        assert captured.counts == {"attention": 1}
        assert_same_results(captured, training=True)


def shape_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # SAM: the bias is brought to the scores' shape by them.
    scores = (q * 0.3) @ k.transpose(-2, -1)
    scores = scores + torch.linspace(-1, 1, scores.numel(), device=q.device).to(q.dtype).reshape_as(scores)
    return torch.softmax(scores.float(), -1).type_as(scores) @ v


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_reading_the_shape_of_the_scores_is_no_reading(dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(shape_of_the_scores, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training)


def dropped_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.mT * 0.3, -1), 0.25, True) @ v


def test_dropout_is_computed_inline_with_the_sources_probability() -> None:
    captured = capture(dropped_out, *tensors(training=True), training=True)
    (node,) = captured.operators()
    assert node.args[9] == 0.25
    assert str(node.target) == "infuse.attention.inline"
    torch.manual_seed(0)
    expected = captured.original(*captured.inputs)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(captured.rewritten(*captured.inputs)[0], expected)


def test_dropout_is_refused_under_exact_numerics() -> None:
    captured = capture(dropped_out, *tensors(), settings=Settings(numerics="exact"))
    assert captured.counts == {}
    assert "random numbers" in captured.refusals[0]


@pytest.mark.parametrize("function", [dropped_out, gemma2, safe_by_nan_to_num])
def test_verification_runs_the_operator_with_its_arguments(function: Function) -> None:
    args = list(tensors())
    if function is safe_by_nan_to_num:
        args.append(torch.ones(B, 1, S, T, dtype=torch.bool).tril())
    captured = capture(function, *args, settings=Settings(verify="compile"))
    assert captured.counts == {"attention": 1}
    assert ("random" if function is dropped_out else "verified: error") in captured.records[0].verified


def test_module_of_dropout_keeps_its_symbolic_probability() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.25)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.drop(torch.softmax(q @ k.mT * 0.3, -1)) @ v
            return out

    assert capture(Attention().train(), *tensors(), dynamic=True).operators()[0].args[9] != 0.0
    assert capture(Attention().eval(), *tensors(), dynamic=True).operators()[0].args[9] == 0.0
