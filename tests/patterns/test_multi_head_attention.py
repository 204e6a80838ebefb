"""torch.nn.MultiheadAttention and the modules that are made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.patterns.capture import MODES, assert_same_results, capture, inline_overload, parameters

EMBED, HEADS, LENGTH, KEYS, BATCH = 16, 4, 5, 6, 2


def module(dtype: torch.dtype, training: bool, **options: Any) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(EMBED, HEADS, **options)
    parameters(made, dtype)
    for parameter in made.parameters():
        parameter.requires_grad_(training)
    return made.train(training)


def self_attention(m: Any, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = m(x, x, x, need_weights=False)[0]
    return out


def with_weights(m: Any, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = m(x, x, x)[0]
    return out


def cross_attention(m: Any, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = m(x, y, y, need_weights=False)[0]
    return out


def three_inputs(m: Any, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = m(x, y, y + 1, need_weights=False)[0]
    return out


def causal(m: Any, x: Tensor, y: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    out: Tensor = m(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    return out


def padded(m: Any, x: Tensor, y: Tensor) -> Tensor:
    padding = torch.arange(KEYS, device=x.device).expand(x.shape[0], KEYS) >= KEYS - 2
    mask = torch.ones(LENGTH, KEYS, dtype=torch.bool, device=x.device).triu(2)
    out: Tensor = m(x, y, y, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]
    return out


def mask_of_each_head(m: Any, x: Tensor, y: Tensor) -> Tensor:
    mask = torch.ones(BATCH * HEADS, LENGTH, LENGTH, dtype=torch.bool, device=x.device).triu(1)
    out: Tensor = m(x, x, x, attn_mask=mask)[0]
    return out


@pytest.mark.parametrize(("dtype", "training", "dynamic"), [mode for mode in MODES if not mode[2]])
@pytest.mark.parametrize("place", [None, inline_overload])
@pytest.mark.parametrize(
    "call", [self_attention, with_weights, cross_attention, three_inputs, causal, padded, mask_of_each_head]
)
def test_the_attention_of_the_module_becomes_the_operator(
    call: Callable[..., Tensor], place: Any, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    made = module(dtype, training, batch_first=True)
    x, y = torch.randn(BATCH, LENGTH, EMBED, dtype=dtype), torch.randn(BATCH, KEYS, EMBED, dtype=dtype)
    options = {} if place is None else {"place": place}
    captured = capture(
        lambda x, y: call(made, x, y), x.requires_grad_(training), y, training=training, dynamic=dynamic, **options
    )
    assert captured.refusals == []
    assert captured.counts == {"attention": 1}
    assert "multi_head_attention_forward" not in captured.targets()
    assert_same_results(captured, training)


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 8, "vdim": 12}])
def test_projections_of_other_kinds(options: dict[str, Any]) -> None:
    made = module(torch.float32, False, **options)
    x = torch.randn(LENGTH, BATCH, EMBED)
    k, v = torch.randn(KEYS, BATCH, options.get("kdim", EMBED)), torch.randn(KEYS, BATCH, options.get("vdim", EMBED))
    captured = capture(lambda x, k, v: made(x, k, v, need_weights=False)[0], x, k, v)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", [self_attention, causal, padded])
@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_appended_keys(options: dict[str, Any], call: Callable[..., Tensor], training: bool) -> None:
    made = module(torch.float32, training, batch_first=True, **options)
    x, y = torch.randn(BATCH, LENGTH, EMBED), torch.randn(BATCH, KEYS, EMBED)
    captured = capture(lambda x, y: call(made, x, y), x.requires_grad_(training), y, training=training)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training)


def test_weights_that_are_dropped_do_not_count() -> None:
    def function(m: Any, x: Tensor) -> Any:
        out, weights = m(x, x, x)
        weights = weights[:, None].broadcast_to(BATCH, HEADS, LENGTH, LENGTH)
        return out

    made = module(torch.float32, False)
    captured = capture(lambda x: function(made, x), torch.randn(LENGTH, BATCH, EMBED))
    assert captured.counts == {"attention": 1}


def test_sequence_without_a_batch() -> None:
    made = module(torch.float32, False)
    captured = capture(lambda x: made(x, x, x, need_weights=False)[0], torch.randn(LENGTH, EMBED))
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


def test_a_packed_projection_is_computed_once() -> None:
    made = module(torch.float32, False)
    captured = capture(lambda x: made(x, x, x, need_weights=False)[0], torch.randn(LENGTH, BATCH, EMBED))
    linears = [node for node in captured.rewritten.graph.nodes if node.target is torch.nn.functional.linear]
    assert len(linears) == 2  # One for q, k and v, one for the result.


def test_dropout_of_the_module_is_handed_on() -> None:
    made = module(torch.float32, True, dropout=0.25)
    captured = capture(lambda x: made(x, x, x, need_weights=False)[0], torch.randn(LENGTH, BATCH, EMBED), training=True)
    assert captured.operators()[0].args[9] == 0.25


def test_encoder_and_decoder_layers_in_training() -> None:
    encoder = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    captured = capture(lambda x: decoder(x, encoder(x), tgt_mask=mask, tgt_is_causal=True), x, training=True)
    assert captured.counts["attention"] == 3
    assert_same_results(captured, training=True)


def read_weights(m: Any, x: Tensor) -> Any:
    return m(x, x, x)


@pytest.mark.parametrize(
    ("function", "options", "word"),
    [
        (read_weights, {}, "read elsewhere"),
    ],
)
def test_what_the_operator_has_not_is_refused(function: Any, options: dict[str, Any], word: str) -> None:
    made = module(torch.float32, False, **options)
    captured = capture(lambda x: function(made, x), torch.randn(LENGTH, BATCH, EMBED))
    assert captured.counts == {}
    assert word in captured.refusals[0]


@pytest.mark.parametrize("training", [False, True])
def test_an_embedding_whose_size_is_a_symbol_is_the_modules(training: bool) -> None:
    """An input of the graph, with dynamic=True: only the module knows the size, by which torch checks it."""
    made = module(torch.float32, training)
    captured = capture(
        lambda x: made(x, x, x, need_weights=False)[0],
        torch.randn(LENGTH, BATCH, EMBED),
        dynamic=True,
        training=training,
    )
    assert captured.counts == {"attention": 1}
    assert_same_results(captured, training)
