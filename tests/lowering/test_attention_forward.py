"""Attention of many query rows: which kernels compete, and the map of a mask's tiles, made once for a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

import infuse
from infuse.lowering import decisions
from infuse.ops.attention_tile_map import tile_map_ref
from tests.lowering.compiled import compiled_code
from tests.lowering.pretended_attention import forward_on_cpu

OPS = torch.ops.infuse
SCALE = 8.0**-0.5
QUERIES, KEYS = 96, 130


@pytest.fixture
def maps(implement_on_cpu: Callable[[str, Callable[..., Any]], None]) -> list[Tensor]:
    """The kernel by its formula; the masks of which a map was made."""
    found: list[Tensor] = []

    def tile_map(mask: Tensor, queries: int, keys: int) -> Tensor:
        found.append(mask)
        return tile_map_ref(mask, queries, keys)

    implement_on_cpu("attention_tile_map", tile_map)
    implement_on_cpu("attention_forward_out", forward_on_cpu)
    return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, QUERIES, 4, 8).transpose(1, 2).bfloat16()
    return q, torch.randn(2, 2, KEYS, 8).bfloat16(), torch.randn(2, 2, KEYS, 8).bfloat16()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    return OPS.attention(q, k, v, mask, SCALE, False, *rest)  # type: ignore[no-any-return]


def check(function: Callable[..., Any], *args: Tensor) -> str:
    """Compiled with kernels and in eager the same; the generated code."""
    with infuse.override(kernels="always"):
        out, code = compiled_code(function, *args)
    torch.testing.assert_close(out, function(*args), atol=2e-2, rtol=2e-2)
    return code


def test_layers_with_one_mask_share_its_map(maps: list[Tensor]) -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(KEYS) < lengths[:, None, None, None]).expand(2, 1, QUERIES, KEYS)
        return attend(attend(attend(q, k, v, mask), k, v, mask), k, v, mask)

    code = check(layers, *inputs(), torch.tensor([3, KEYS]))
    assert code.count("torch.ops.infuse.attention_tile_map.default(") == 1
    assert [mask.shape for mask in maps] == [(2, 1, QUERIES, KEYS)]


def test_masks_that_differ_have_maps_of_their_own(maps: list[Tensor]) -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return attend(attend(q, k, v, first), k, v, second)

    check(layers, *inputs(), torch.rand(2, 1, QUERIES, KEYS) < 0.5, torch.rand(2, 1, QUERIES, KEYS) < 0.5)
    assert len(maps) == 2


def test_a_mask_that_is_expanded_is_looked_at_once(maps: list[Tensor]) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q, k, v, mask.expand(2, 4, QUERIES, KEYS))

    check(layer, *inputs(), torch.rand(1, 1, QUERIES, KEYS) < 0.5)
    assert [mask.shape for mask in maps] == [(1, 1, QUERIES, KEYS)]


def test_softcap_sinks_and_causal_need_no_map(maps: list[Tensor]) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        causal: Tensor = OPS.attention(q, k, v, None, SCALE, True)
        return causal + attend(q, k, v, None, 2.0) + attend(q, k, v, None, 0.0, sinks)

    code = check(layer, *inputs(), torch.randn(4))
    assert code.count("infuse_attention_forward") >= 3
    assert maps == []


def test_max_autotune_counts_the_map_among_the_kernels_cost(maps: list[Tensor]) -> None:
    args = (*inputs(), torch.rand(2, 1, QUERIES, KEYS) < 0.5)
    out, _ = compiled_code(attend, *args, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, attend(*args), atol=2e-2, rtol=2e-2)
    (decision,) = decisions.decisions()
    assert {"sdpa", "forward_-1", "forward_0", "forward_1"} == set(decision.timings_ms)
    assert len(maps) >= 3
    assert all(made.all() for made in maps[:3])


def test_a_configuration_that_does_not_take_the_shape_is_no_candidate(
    implement_on_cpu: Callable[[str, Callable[..., Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    def run(*args: Any) -> None:
        if args[12] == 1:
            raise RuntimeError("attention_forward_out: configuration narrow, got another head_dim, expected one it has")
        forward_on_cpu(*args)

    implement_on_cpu("attention_forward_out", run)
    compiled_code(attend, *inputs(), None, mode="max-autotune-no-cudagraphs")
    (decision,) = decisions.decisions()
    assert set(decision.timings_ms) == {"sdpa", "forward_-1", "forward_0"}
    assert not [record for record in caplog.records if "autotuning" in record.getMessage()]


@torch._inductor.config.patch(cpp_wrapper=True)
def test_generated_cpp_has_the_formula(maps: list[Tensor]) -> None:
    """Which cannot call the kernels."""

    def layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    code = check(layer, *inputs(), torch.rand(2, 1, QUERIES, KEYS) < 0.5)
    assert "infuse_attention" not in code
    assert maps == []
