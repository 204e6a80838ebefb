"""q/k norm + rotation + cache write: the spellings that are one site, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.lowering.policy import place as lowering_place
from infuse.patterns.passes import rewrite
from infuse.report import Placement
from infuse.settings import Settings
from tests.patterns.capture import Captured, assert_same_results, capture, composites
from tests.patterns.rope_spellings import full, rotate_every_two, rotate_half
from tests.patterns.test_rope_models import hugging_face

BATCH, HEADS, KV_HEADS, DIM, LENGTH, CACHE = 2, 4, 2, 8, 3, 7


def captured_of(function: Callable[..., Any], *args: Any, kernels: Sequence[str] = (), **kwargs: Any) -> Captured:
    """As if there were a kernel for the cache write, and more `kernels`."""
    with torch.no_grad():
        return capture(function, *args, place=composites("rope_cache_write", *kernels), **kwargs)


rope = full(rotate_half)
Caches = tuple[Tensor, Tensor]


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=True)


def heads(x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, heads, seq_len, D] of a packed projection."""
    q, k, v = x.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def put_by_assignment(cache: Tensor, positions: Tensor, value: Tensor) -> None:
    cache[:, :, positions] = value


def put_by_full_assignment(cache: Tensor, positions: Tensor, value: Tensor) -> None:
    cache[:, :, positions, :] = value


def put_by_index_copy(cache: Tensor, positions: Tensor, value: Tensor) -> None:
    cache.index_copy_(2, positions, value)


def put_by_index_copy_from_the_end(cache: Tensor, positions: Tensor, value: Tensor) -> None:
    cache.index_copy_(dim=-2, index=positions, source=value)


def put_by_index_put(cache: Tensor, positions: Tensor, value: Tensor) -> None:
    torch.ops.aten.index_put_.default(cache, [None, None, positions], value)


PUTS = (
    put_by_assignment,
    put_by_full_assignment,
    put_by_index_copy,
    put_by_index_copy_from_the_end,
    put_by_index_put,
)


def step(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    put: Callable[[Tensor, Tensor, Tensor], None] = put_by_assignment,
) -> tuple[Tensor, ...]:
    q, k, v = heads(x)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    put(k_cache, positions, k)
    put(v_cache, positions, v)
    return attend(q, k_cache, v_cache), k_cache.clone(), v_cache.clone()


def inputs(dtype: torch.dtype = torch.float32, index: torch.dtype = torch.int64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        random(BATCH, LENGTH, HEADS + 2 * KV_HEADS, DIM),
        random(LENGTH, DIM),
        random(LENGTH, DIM),
        random(BATCH, KV_HEADS, CACHE, DIM),
        random(BATCH, KV_HEADS, CACHE, DIM),
        torch.tensor([4, 0, 5], dtype=index),
    )


def assert_one_site(captured: Captured, sites: int = 1, **others: int) -> None:
    assert captured.counts == {"rope_cache_write": sites, **others}, captured.counts
    assert captured.refusals == []
    targets = captured.targets()
    assert targets.isdisjoint({"setitem", "index_copy_", "index_put_"}), targets
    assert_same_results(captured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("put", PUTS)
def test_every_way_to_write(put: Callable[..., None], dtype: torch.dtype) -> None:
    assert_one_site(captured_of(lambda *args: step(*args, put=put), *inputs(dtype)), attention=1)


def test_sizes_may_be_symbolic() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        batch, length, _, dim = x.shape
        for cache in (k_cache, v_cache):
            assert cache.shape[0] == batch and cache.shape[3] == dim and cache.shape[1] == KV_HEADS
        assert at.shape[0] == length
        return step(x, cos, sin, k_cache, v_cache, at)

    assert_one_site(captured_of(function, *inputs(), dynamic=True), attention=1)


def test_assignment_of_symbolic_sizes_might_broadcast() -> None:
    """One row for all positions would have the same graph, unless the author asserts that it is not so."""
    captured = captured_of(step, *inputs(), dynamic=True)
    assert captured.counts == {"rope": 2, "attention": 1}


def test_positions_may_be_int32() -> None:
    assert_one_site(captured_of(step, *inputs(index=torch.int32)), attention=1)


def test_v_may_be_written_first() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        q, k, v = heads(x)
        v_cache[:, :, at] = v
        k_cache[:, :, at] = rope(k, cos, sin)
        return attend(rope(q, cos, sin), k_cache, v_cache), k_cache.clone()

    captured = captured_of(function, *inputs())
    # q is rotated after the writes: nothing says that it could be earlier, and the keys have no partner.
    assert captured.counts == {"rope": 2, "attention": 1}
    assert_same_results(captured)


def test_q_rotated_before_v_is_written_first() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        q, k, v = heads(x)
        q = rope(q, cos, sin)
        v_cache[:, :, at] = v
        k_cache[:, :, at] = rope(k, cos, sin)
        return attend(q, k_cache, v_cache), k_cache.clone(), v_cache.clone()

    assert_one_site(captured_of(function, *inputs()), attention=1)


def test_result_of_index_copy_is_the_cache() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        q, k, v = heads(x)
        q = rope(q, cos, sin)
        keys = k_cache.index_copy_(2, at, rope(k, cos, sin))
        values = v_cache.index_copy_(2, at, v)
        return attend(q, keys, values), keys + 1, values + 1

    assert_one_site(captured_of(function, *inputs()), attention=1)


def test_written_v_may_be_read_elsewhere() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        q, k, v = heads(x)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k_cache[:, :, at] = k
        v_cache[:, :, at] = v
        return attend(q, k_cache, v_cache), v * 2

    assert_one_site(captured_of(function, *inputs()), attention=1)


def test_cache_may_be_read_before_and_after() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        before = k_cache * 2, v_cache.sum()
        result = step(x, cos, sin, k_cache, v_cache, at)
        return *before, *result, k_cache.exp(), v_cache * 3

    assert_one_site(captured_of(function, *inputs()), attention=1)


def test_positions_before_heads() -> None:
    """Rotated as [batch, seq_len, heads, D], transposed for the cache, as gpt-fast and torchtune do."""

    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        q, k, v = x.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        cos, sin = cos[:, None], sin[:, None]
        q, k = full(rotate_every_two)(q, cos, sin), full(rotate_every_two)(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k_cache[:, :, at] = k
        v_cache[:, :, at] = v
        return attend(q, k_cache, v_cache), k_cache.clone(), v_cache.clone()

    assert_one_site(captured_of(function, *inputs()), attention=1)


def test_norms_belong_to_it() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        q, k, v = heads(x)
        q, k = F.rms_norm(q, (DIM,), cos[0], 1e-6), F.rms_norm(k, (DIM,), sin[0], 1e-6)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k_cache[:, :, at] = k
        v_cache[:, :, at] = v
        return attend(q, k_cache, v_cache), k_cache.clone(), v_cache.clone()

    assert_one_site(captured_of(function, *inputs()), attention=1)


def test_different_norms_stay_before_it() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        q, k, v = heads(x)
        q, k = F.rms_norm(q, (DIM,), cos[0], 1e-6), F.rms_norm(k, (DIM,), sin[0], 1e-5)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k_cache[:, :, at] = k
        v_cache[:, :, at] = v
        return attend(q, k_cache, v_cache), k_cache.clone(), v_cache.clone()

    assert_one_site(captured_of(function, *inputs()), attention=1, rms_norm=2)


def test_layers_have_a_site_each() -> None:
    def function(
        x: Tensor, cos: Tensor, sin: Tensor, k0: Tensor, v0: Tensor, at: Tensor, k1: Tensor, v1: Tensor
    ) -> Any:
        first, *_ = step(x, cos, sin, k0, v0, at)
        total = x + torch.cat((first, first), 1).transpose(1, 2)
        return *step(total, cos, sin, k1, v1, at), k0.clone(), v0.clone()

    args = inputs()
    assert_one_site(captured_of(function, *args, args[3] + 1, args[4] + 1), sites=2, attention=2)


def test_one_cache_written_twice() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        first = step(x, cos, sin, k_cache, v_cache, at)
        return *first, *step(x * 2, cos, sin, k_cache, v_cache, at + 1)

    assert_one_site(captured_of(function, *inputs()), sites=2, attention=2)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
def test_torchtune(tokens: int) -> None:
    llama3 = pytest.importorskip("torchtune.models.llama3")
    sizes = {"vocab_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
    model = llama3.llama3(**sizes, max_seq_len=16, intermediate_dim=32).eval()
    model.setup_caches(batch_size=1, dtype=torch.float32)
    mask = torch.ones(1, tokens, 16, dtype=torch.bool)
    positions = torch.arange(tokens)[None]
    captured = captured_of(
        lambda ids: model(ids, mask=mask, input_pos=positions), torch.ones(1, tokens, dtype=torch.int64)
    )
    assert captured.counts["rope_cache_write"] == 2 and "rope" not in captured.counts
    assert_same_results(captured)


@pytest.mark.parametrize(
    ("name", "norms", "kernels"), [("llama", False, ()), ("qwen3", True, ()), ("qwen3", True, ("qk_norm_rope",))]
)
def test_hugging_face_static_cache(name: str, norms: bool, kernels: tuple[str, ...]) -> None:
    """Also where rotations and their norms have become one operator before."""
    transformers = pytest.importorskip("transformers")
    model = hugging_face(name, {"head_dim": 8}, torch.float32)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)
    ids = torch.ones(1, 1, dtype=torch.int64)
    captured = captured_of(lambda ids: model(ids, past_key_values=cache).logits, ids, kernels=kernels)
    layers = model.config.num_hidden_layers
    assert captured.counts["rope_cache_write"] == layers and "rope" not in captured.counts
    written = [node for node in captured.operators() if "rope_cache_write" in str(node.target)]
    assert all((node.args[13] is not None) == norms for node in written)
    assert_same_results(captured)


class FastCache(nn.Module):
    """gpt-fast's cache."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, KV_HEADS, CACHE, DIM))
        self.register_buffer("v_cache", torch.zeros(1, KV_HEADS, CACHE, DIM))

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        assert input_pos.shape[0] == k_val.shape[2]
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class FastAttention(nn.Module):
    """gpt-fast's attention: one packed projection, pairs of neighbours rotated in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.kv_cache = FastCache()

    @staticmethod
    def rotate(x: Tensor, table: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        table = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
        first = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
        second = pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]
        return torch.stack([first, second], -1).flatten(3).type_as(x)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.wqkv(x).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
        q = q.view(batch, length, HEADS, DIM)
        k, v = (t.view(batch, length, KV_HEADS, DIM) for t in (k, v))
        q, k = self.rotate(q, freqs_cis), self.rotate(k, freqs_cis)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gpt_fast(dynamic: bool) -> None:
    table = torch.randn(CACHE, DIM // 2, 2)
    input_pos = torch.tensor([2, 3, 4])
    mask = torch.ones(CACHE, CACHE, dtype=torch.bool).tril()[None, None, input_pos]
    x = torch.randn(1, 3, HEADS * DIM)
    captured = captured_of(FastAttention(), x, table[input_pos], mask, input_pos, dynamic=dynamic)
    assert_one_site(captured, attention=1)


def test_exported_graphs() -> None:
    """Pre-dispatch ATen: index_put_, of a value whose batch of one was dropped."""
    input_pos = torch.tensor([2, 3, 4])
    mask = torch.ones(CACHE, CACHE, dtype=torch.bool).tril()[None, None, input_pos]
    args = (torch.randn(1, 3, HEADS * DIM), torch.randn(3, DIM // 2, 2), mask, input_pos)
    module = FastAttention()
    with torch.no_grad():
        exported = torch.export.export(module, args).graph_module
        original = copy.deepcopy(exported)
        records = rewrite(exported.graph, Settings(), composites("rope_cache_write"), False)
        exported.recompile()
        inputs = [module.wqkv.weight, *module.kv_cache.buffers(), *args]
        mine, theirs = ([tensor.clone() for tensor in inputs] for _ in range(2))
        torch.testing.assert_close(exported(*mine), original(*theirs))
    assert [record.kind for record in records] == ["rope_cache_write", "attention"]
    torch.testing.assert_close(mine, theirs)
    assert bool(mine[1][:, :, input_pos].abs().sum() > 0)


# --- the lowering ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_lowering_leaves_it_to_its_parts_without_a_kernel(training: bool) -> None:
    def place(kind: str, args: tuple[object, ...], training: bool) -> Placement:
        return lowering_place(kind, args, training, settings=Settings(), max_autotune=True)

    captured = capture(step, *inputs(), training=training, place=place)
    assert captured.counts == {"rope": 2, "attention": 1}
    assert captured.notes == ["rope_cache_write: left to its parts (no rope_cache_write kernel: no kernel for cpu)"]
