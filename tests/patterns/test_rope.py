"""Rotary embeddings: every spelling, in every dtype, and what surrounds them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.settings import Settings
from tests.patterns.capture import MODES, assert_same_results, capture
from tests.patterns.rope_spellings import (
    DIM,
    HEADS,
    LENGTH,
    SPELLINGS,
    WIDE_SPELLINGS,
    Rope,
    Rotated,
    full,
    halves,
    rotate_half,
    tokens,
    torchtune,
    upcast,
)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(("rope", "width", "spelling"), SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(rope: Rope, width: int, spelling: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    captured = capture(Rotated(rope, width).to(dtype), tokens(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"rope": 1}
    assert captured.spellings == [spelling]
    assert_same_results(captured, training)


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize(("rope", "width", "spelling"), WIDE_SPELLINGS.values(), ids=WIDE_SPELLINGS)
def test_spellings_in_float32(
    rope: Rope, width: int, spelling: str, dtype: torch.dtype, training: bool, dynamic: bool
) -> None:
    module = Rotated(rope, width, table=torch.float32).to(dtype)
    captured = capture(module, tokens(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"rope": 1}
    assert captured.spellings[0].removesuffix(", in float32") == spelling
    (operator,) = captured.operators()
    assert operator.args[0].meta["example_value"].dtype == dtype  # the cast is the operator's
    assert_same_results(captured, training)


@pytest.mark.parametrize("rope", [full(rotate_half), upcast, torchtune], ids=["rotate_half", "upcast", "torchtune"])
def test_nothing_is_rounded_otherwise(rope: Rope) -> None:
    module = Rotated(rope, 4 if rope is torchtune else 8).bfloat16()
    captured = capture(module, tokens(torch.bfloat16), settings=Settings(numerics="exact"))
    assert captured.counts == {"rope": 1}
    before, after = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_tables_in_another_dtype(table: torch.dtype, heads_first: bool) -> None:
    """x in bfloat16 and tables in float32 give float32, and so do tables in bfloat16 with x in float32."""
    x_dtype = torch.bfloat16 if table == torch.float32 else torch.float32
    module = Rotated(full(rotate_half), table=table, heads_first=heads_first).to(x_dtype)
    captured = capture(module, tokens(x_dtype, training=True), training=True)
    assert captured.counts == {"rope": 1}
    assert captured.operators()[0].meta["example_value"].dtype == torch.float32
    assert_same_results(captured, training=True)


def test_gradients_of_the_tables() -> None:
    cos, sin = (torch.randn(LENGTH, DIM, requires_grad=True) for _ in range(2))
    x = torch.randn(2, HEADS, LENGTH, DIM, requires_grad=True)
    captured = capture(full(rotate_half), x, cos, sin, training=True)
    assert captured.counts == {"rope": 1}
    assert_same_results(captured, training=True)


def test_under_autocast() -> None:
    def autocast(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return full(rotate_half)(F.linear(x, weight), cos, sin)

    table = torch.randn(LENGTH, DIM)
    captured = capture(autocast, torch.randn(2, LENGTH, DIM), torch.randn(DIM, DIM), table, table + 1)
    assert captured.counts == {"rope": 1}
    assert_same_results(captured)


def test_q_and_k_are_two_sites_and_stacked_they_are_one() -> None:
    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return halves(q, cos, sin), halves(k, cos, sin)

    def as_one(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return halves(torch.cat([q, k], dim=1), cos, sin).split([3, 2], dim=1)

    q, k, table = torch.randn(2, 3, LENGTH, 8), torch.randn(2, 2, LENGTH, 8), torch.randn(LENGTH, 4)
    for function, count in ((both, 2), (as_one, 1)):
        captured = capture(function, q, k, table, table + 1)
        assert captured.counts == {"rope": count} and captured.refusals == []
        assert_same_results(captured)


def test_a_rotation_of_a_part_is_a_site_over_the_part() -> None:
    """Multi-head latent attention rotates the last elements, vision models rotate rows and columns apart."""

    def latent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        passed, rotated = x.split([8, 8], dim=-1)
        return torch.cat((passed, full(rotate_half)(rotated, cos, sin)), dim=-1)

    def axial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, columns = x.chunk(2, -1)
        return torch.cat([full(rotate_half)(rows, cos, sin), full(rotate_half)(columns, sin, cos)], dim=-1)

    x, table = torch.randn(2, 3, LENGTH, 16), torch.randn(LENGTH, 8)
    for function, count in ((latent, 1), (axial, 2)):
        captured = capture(function, x, table, table + 1)
        assert captured.counts == {"rope": count} and captured.refusals == []
        assert_same_results(captured)


def test_other_readers_do_not_matter() -> None:
    def read_elsewhere(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = rotate_half(x)
        straight = x * cos
        return straight + turned * sin, turned.exp(), straight.exp(), x.exp()

    table = torch.randn(LENGTH, 8)
    captured = capture(read_elsewhere, torch.randn(2, 3, LENGTH, 8), table, table + 1)
    assert captured.counts == {"rope": 1}
    assert_same_results(captured)


def test_a_result_that_is_rounded_and_widened_stays_so() -> None:
    def rounded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return full(rotate_half)(x, cos, sin).bfloat16().float()

    table = torch.randn(LENGTH, 8)
    captured = capture(rounded, torch.randn(2, 3, LENGTH, 8), table, table + 1)
    assert captured.counts == {"rope": 1}
    before, after = captured.original(*captured.inputs), captured.rewritten(*captured.inputs)
    assert torch.equal(before[0], after[0])


def test_export() -> None:
    module = Rotated(full(rotate_half))
    program = torch.export.export(module, (tokens(torch.float32),))
    from infuse.patterns.passes import rewrite
    from tests.patterns.capture import default_overload

    x = tokens(torch.float32)
    expected = program.module()(x)
    (record,) = rewrite(program.graph_module.graph, Settings(), default_overload, False)
    program.graph_module.recompile()
    assert (record.kind, record.status) == ("rope", "rewritten")
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("cast", ["to", "type_as"])
def test_attention_reads_the_operator_through_a_cast_that_changes_nothing(cast: str) -> None:
    """In float32 `rotated.type_as(q)` is q's own dtype: an alias, whose input names the same value."""

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-2)
        return turned.type_as(x) if cast == "type_as" else turned.to(x.dtype)

    def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v)

    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    angles = torch.randn(5, 4)
    captured = capture(attention, q, k, v, angles.cos(), angles.sin())
    assert captured.counts == {"rope": 2, "attention": 1}
    operators = captured.operators()
    assert [node.args[:2] for node in operators if "attention" in str(node.target)] == [tuple(operators[:2])]
    assert_same_results(captured)
