"""torch's fast path of nn.TransformerEncoderLayer, one operator, is taken apart for the matchers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infuse.patterns.passes import rewrite
from infuse.settings import Settings
from tests.patterns.capture import Captured, assert_same_results, capture, inline_overload, parameters

BATCH, LENGTH, EMBED, HEADS = 2, 5, 32, 4


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> nn.TransformerEncoderLayer:
    made = nn.TransformerEncoderLayer(EMBED, HEADS, 64, batch_first=True, **options)
    parameters(made, dtype)
    for parameter in made.parameters():
        parameter.data /= 8 if parameter.dim() == 2 else 1
    return made.eval()


def padding(whole_row: bool = False) -> Tensor:
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 0 if whole_row else 3 :] = True
    return mask


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"src_key_padding_mask": padding()},
    "causal": {"src_mask": causal()},
    "both": {"src_key_padding_mask": padding(), "src_mask": causal()},
    "each head's": {"src_mask": causal().expand(BATCH * HEADS, LENGTH, LENGTH)},
}


def captured_layer(made: nn.Module, dynamic: bool = False, **masks: Tensor) -> Captured:
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=next(made.parameters()).dtype)
    captured = capture(lambda x: made(x, **masks), x, dynamic=dynamic, place=inline_overload)
    called = {node.target for node in captured.original.graph.nodes}
    assert torch._transformer_encoder_layer_fwd in called, "torch took the slow path"
    return captured


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
def test_attention_and_norms_are_found(norm_first: bool, dtype: torch.dtype, masks: dict[str, Tensor]) -> None:
    captured = captured_layer(layer(dtype, norm_first=norm_first), **masks)
    norms = {"layer_norm": 1, "add_layer_norm": 1} if norm_first else {"add_layer_norm": 2}
    assert captured.counts == {"attention": 1, **norms}
    assert_same_results(captured)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gelu_and_dynamic_shapes(dynamic: bool) -> None:
    try:
        captured = captured_layer(layer(activation="gelu"), dynamic=dynamic)
    except torch._dynamo.exc.Unsupported:
        assert dynamic
        pytest.skip("this torch breaks the graph at the operator where shapes are symbolic")
    assert captured.counts == {"attention": 1, "add_layer_norm": 2}
    assert_same_results(captured)


def test_a_row_that_is_masked_whole_is_nan_as_before() -> None:
    captured = captured_layer(layer(), src_key_padding_mask=padding(whole_row=True))
    before, after = captured.original(*captured.inputs)[0], captured.rewritten(*captured.inputs)[0]
    assert before[1].isnan().all()
    torch.testing.assert_close(after, before, equal_nan=True)


def test_a_mask_of_numbers_masks_where_it_is_not_zero() -> None:
    """So torch's operator reads it, whatever the numbers are."""
    numbers = torch.zeros(LENGTH, LENGTH).masked_fill(causal(), 0.5)
    captured = captured_layer(layer(), src_mask=numbers)
    assert captured.counts["attention"] == 1
    assert_same_results(captured)


def assert_left_whole(captured: Captured) -> None:
    assert captured.counts == {}
    assert sorted(record.kind for record in captured.records) == ["attention", "layer_norm", "layer_norm"]
    assert all("fast path" in record.reason and "set_fastpath" in record.remedy for record in captured.records)


def test_exact_numerics_leave_it_whole() -> None:
    made = layer()
    assert_left_whole(capture(made, torch.randn(BATCH, LENGTH, EMBED), settings=Settings(numerics="exact")))


def test_no_attention_wanted_leaves_it_whole() -> None:
    captured = capture(layer(), torch.randn(BATCH, LENGTH, EMBED), settings=Settings(patterns=("layer_norm",)))
    assert captured.counts == {}
    assert [record.kind for record in captured.records] == ["layer_norm", "layer_norm"]


def test_a_graph_that_switches_autocast_is_left_alone() -> None:
    made = layer()

    def function(x: Tensor) -> Tensor:
        x = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.linear(x, x[0])

    assert_left_whole(capture(function, torch.randn(BATCH, LENGTH, EMBED)))


def test_exported_layer() -> None:
    made, x = layer(), torch.randn(BATCH, LENGTH, EMBED)
    with torch.no_grad():
        exported = torch.export.export(made, (x,))
    records = rewrite(exported.graph_module.graph, Settings(), inline_overload, training=False)
    exported.graph_module.recompile()
    assert sorted(record.kind for record in records) == ["add_layer_norm", "add_layer_norm", "attention"]
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), made(x))
