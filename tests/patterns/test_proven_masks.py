"""Attention with masks that are proven: the operator's arguments, values and gradients, and masks that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.patterns.passes import rewrite
from infuse.settings import Settings
from tests.patterns.capture import MODES, Captured, assert_same_results, capture, default_overload, inline_overload

B, H, S, D = 2, 3, 6, 8
LOWEST = torch.finfo(torch.float32).min


def tensors(dtype: torch.dtype = torch.float32, training: bool = False, keys: int = S) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((B, H, S, D), (B, H, keys, D), (B, H, keys, D))
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_(training) for shape in shapes)


def arguments(captured: Captured) -> dict[str, Any]:
    """The first attention operator's arguments by name."""
    node = next(node for node in captured.operators() if "attention" in str(node.target))
    schema = torch.ops.infuse.attention.default._schema
    return {argument.name: value for argument, value in zip(schema.arguments, node.args)}


def indices(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]


def causal_bool(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def causal_indices(q: Tensor, k: Tensor) -> Tensor:
    i, j = indices(q, k)
    return (j <= i)[None, None].expand(q.shape[0], 1, -1, -1)


def causal_infinity(q: Tensor, k: Tensor) -> Tensor:
    return torch.triu(torch.full((q.shape[-2], k.shape[-2]), -math.inf), diagonal=1).to(q.dtype)


def causal_lowest(q: Tensor, k: Tensor) -> Tensor:
    i, j = indices(q, k)
    return torch.where(j <= i, 0.0, torch.finfo(q.dtype).min).to(q.dtype)


def causal_in_place(q: Tensor, k: Tensor) -> Tensor:
    mask = torch.empty(q.shape[-2], k.shape[-2]).fill_(-math.inf).triu_(1)
    return mask.to(q.dtype)


def all_true(q: Tensor, k: Tensor) -> Tensor:
    i, j = indices(q, k)
    return j - i < q.shape[-2]


def all_zero(q: Tensor, k: Tensor) -> Tensor:
    return ((1.0 - torch.ones(q.shape[0], 1, 1, k.shape[-2])) * torch.finfo(q.dtype).min).to(q.dtype)


Maker = Callable[[Tensor, Tensor], Tensor]
CAUSAL: tuple[Maker, ...] = (causal_bool, causal_indices, causal_infinity, causal_lowest, causal_in_place)


def sdpa(make: Maker) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=make(q, k))


def written_out(make: Maker) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, scores = make(q, k), q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v

    return attention


SPELLINGS = (sdpa, written_out)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("make", CAUSAL)
def test_causal_mask_is_dropped(
    make: Maker, spelling: Callable[[Maker], Any], dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    function = spelling(make)
    captured = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert arguments(captured)["mask"] is None and arguments(captured)["is_causal"] is True
    assert "causal mask proven" in captured.spellings[0]
    assert not captured.targets() & {"arange", "tril", "full", "ones", "where", "masked_fill"}
    assert_same_results(captured, training)
    inline = capture(function, *tensors(dtype, training), training=training, dynamic=dynamic, place=inline_overload)
    assert_same_results(inline, training)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("make", [all_true, all_zero])
def test_mask_of_nothing_is_dropped(
    make: Maker, spelling: Callable[[Maker], Any], dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    captured = capture(spelling(make), *tensors(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert arguments(captured)["mask"] is None and arguments(captured)["is_causal"] is False
    assert "mask proven all true" in captured.spellings[0]
    assert_same_results(captured, training)


def shifted(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1)


def strict(q: Tensor, k: Tensor) -> Tensor:
    return torch.triu(torch.full((q.shape[-2], k.shape[-2]), -1.0), 1).to(q.dtype)


def transposed(q: Tensor, k: Tensor) -> Tensor:
    return causal_infinity(k, q).mT


def window(q: Tensor, k: Tensor) -> Tensor:
    i, j = indices(q, k)
    return (j <= i) & (j > i - 3)


def per_head(q: Tensor, k: Tensor) -> Tensor:
    i, j = indices(q, k)
    return j <= i + torch.arange(H)[:, None, None]


def of_data(q: Tensor, k: Tensor) -> Tensor:
    return causal_bool(q, k) & (k[:, :1, :, 0] > -1.0)[:, :, None].logical_or(torch.eye(q.shape[-2], dtype=torch.bool))


def changed_in_place(q: Tensor, k: Tensor) -> Tensor:
    mask = causal_bool(q, k)
    mask[:, 2] = True
    return mask


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("make", [shifted, strict, transposed, window, per_head, of_data, changed_in_place])
def test_other_masks_are_kept(make: Maker, spelling: Callable[[Maker], Any], dynamic: bool) -> None:
    captured = capture(spelling(make), *tensors(), dynamic=dynamic)
    assert captured.counts == {"attention": 1}
    assert arguments(captured)["mask"] is not None
    assert not arguments(captured)["is_causal"]
    assert_same_results(captured)


def test_a_sliding_window_is_named() -> None:
    assert "sliding window 3 proven" in capture(sdpa(window), *tensors()).spellings[0]


def test_a_mask_that_is_an_argument_is_kept() -> None:
    q, k, v = tensors()
    captured = capture(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask), q, k, v, causal_bool(q, k))
    assert arguments(captured)["mask"] is not None
    assert "mask kept" in captured.spellings[0]


@pytest.mark.parametrize("make", CAUSAL)
def test_causal_mask_over_a_longer_cache_is_kept(make: Maker) -> None:
    captured = capture(sdpa(make), *tensors(keys=9))
    assert arguments(captured)["mask"] is not None
    assert_same_results(captured)


def test_a_mask_that_is_written_to_between_two_attentions_is_read_at_each() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        first = F.scaled_dot_product_attention(q, k, v, mask)
        mask.fill_(True)
        return F.scaled_dot_product_attention(first, k, v, mask)

    captured = capture(twice, *tensors())
    first, second = captured.spellings
    assert "causal mask proven" in first and "mask proven all true" in second
    assert_same_results(captured)


def test_a_mask_that_is_written_to_within_an_attention_is_not_taken_for_either() -> None:
    def between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(S, S).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
        kept = mask.view(1, S, S)
        scores = q @ k.mT + mask
        mask[0] = 0.0
        return scores.softmax(-1) @ v + kept.exp().sum()

    captured = capture(between, *tensors())
    assert not any(arguments(captured)["is_causal"] for _ in captured.operators())
    assert_same_results(captured)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_float_mask_is_read_as_the_bool_mask_it_came_from(spelling: Callable[[Maker], Any]) -> None:
    def make(q: Tensor, k: Tensor) -> Tensor:
        return torch.where(window(q, k), 0.0, torch.finfo(q.dtype).min)

    captured = capture(spelling(make), *tensors())
    assert arguments(captured)["mask"].meta["example_value"].dtype == torch.bool
    assert arguments(captured)["masked_rows"] in ("zeros", "none")
    assert "where" not in captured.targets()
    assert_same_results(captured)


def test_float_mask_with_rows_that_may_be_masked_whole_is_read_as_bool_only_if_infinite() -> None:
    def padded(value: float) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
            return (q @ k.mT * 0.3 + torch.where(keys[:, None, None], 0.0, value)).softmax(-1) @ v

        return attention

    keys = torch.ones(B, S, dtype=torch.bool)
    keys[1] = False
    for value, dtype, masked_rows in ((-math.inf, torch.bool, "nan"), (LOWEST, torch.float32, "none")):
        captured = capture(padded(value), *tensors(), keys)
        assert arguments(captured)["mask"].meta["example_value"].dtype == dtype
        assert arguments(captured)["masked_rows"] == masked_rows
        (expected,), (got,) = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_bool_mask_that_changes_behind_the_float_one_is_not_read() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        allowed = torch.ones(S, S, dtype=torch.bool).tril(1)
        mask = torch.where(allowed, 0.0, -math.inf)
        allowed.fill_(False)
        return F.scaled_dot_product_attention(q, k, v, mask)

    captured = capture(attention, *tensors())
    assert arguments(captured)["mask"].meta["example_value"].dtype == torch.float32
    assert_same_results(captured)


def test_a_small_constant_is_no_mask_under_exact_numerics() -> None:
    def make(q: Tensor, k: Tensor) -> Tensor:
        return (1.0 - causal_bool(q, k).float()) * -1e4

    captured = capture(sdpa(make), *tensors())
    assert arguments(captured)["is_causal"]
    assert_same_results(captured)
    captured = capture(sdpa(make), *tensors(), settings=Settings(numerics="exact"))
    assert captured.counts == {} and "masked by -10000" in captured.refusals[0]


def test_the_layers_of_a_model_share_one_mask() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.where(window(q, k), 0.0, torch.finfo(q.dtype).min)
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, k, v, mask)
        return q

    captured = capture(layers, *tensors())
    operators = captured.operators()
    assert captured.counts == {"attention": 3}
    assert len({node.args[3] for node in operators}) == 1
    assert_same_results(captured)


@pytest.mark.parametrize("make", CAUSAL)
def test_exported_graphs(make: Maker) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=make(q, k))

    module = torch.export.export(Model(), tensors()).module()
    expected = module(*tensors())
    records = rewrite(module.graph, Settings(), default_overload, False)
    module.recompile()
    assert ["causal mask proven" in record.spelling for record in records] == [True]
    torch.testing.assert_close(module(*tensors()), expected)


def published(name: str, attention: str, **more: Any) -> nn.Module:
    """A small random model of a published architecture."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "use_cache": False,
        "attn_implementation": attention,
        "pad_token_id": 0,
        **more,
    }
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    return model.eval()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "attention", "more", "words"),
    [
        ("Llama", "sdpa", {}, {"causal mask proven"}),
        ("Llama", "eager", {}, {"causal mask proven"}),
        ("Mistral", "eager", {"sliding_window": 4}, {"sliding window 4 proven"}),
        ("Gemma2", "eager", {"sliding_window": 4, "head_dim": 8}, {"causal mask proven", "sliding window 4 proven"}),
        ("Mixtral", "sdpa", {"num_local_experts": 2}, {"causal mask proven"}),
    ],
)
def test_masks_of_published_models(name: str, attention: str, more: Any, words: set[str], dynamic: bool) -> None:
    model = published(name, attention, **more)
    tokens = torch.randint(1, 32, (2, 8))
    captured = capture(lambda tokens: model(tokens).logits, tokens, dynamic=dynamic)
    spellings = [record.spelling for record in captured.records if record.kind == "attention"]
    proven = {part for spelling in spellings for part in spelling.split(", ") if part.endswith("proven")}
    assert captured.counts["attention"] == 2
    assert proven == words
    assert_same_results(captured)


def test_padding_of_a_published_model_is_kept_as_a_tensor() -> None:
    model = published("Llama", "sdpa")
    tokens, padding = torch.randint(1, 32, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    padding[0, :3] = 0
    captured = capture(lambda t, p: model(t, attention_mask=p).logits, tokens, padding)
    assert arguments(captured)["mask"] is not None
    assert all("causal, padding proven" in record.spelling for record in captured.records if record.kind == "attention")
    assert_same_results(captured)
