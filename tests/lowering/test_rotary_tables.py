"""Lookups of rotary factors: made once and first in the graph, and left where they are in every other case."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from infuse.lowering.rotary_tables import gather_tables_first
from infuse.ops import library
from tests.lowering.compiled import compiled_code

OPS, ATEN = torch.ops.infuse, torch.ops.aten
INDEX = ATEN.index.Tensor
# Of 32 factors in float32: 64 KiB.
MOST_ROWS = 512
Function = Callable[..., Any]
Lookup = Callable[[Tensor, Tensor], Tensor]


@torch.library.custom_op("rotary_tables_test::rope", mutates_args=())
def others_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x * sin


@others_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def pretended_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The write of caches is a call, which computes its formula on the CPU."""
    monkeypatch.setattr(library, "missing", lambda device: "")
    yield
    torch._dynamo.reset()


def inputs(rows: int = 3) -> tuple[Tensor, ...]:
    """x [rows, 1, 2, 16], positions [rows, 1], two tables of cos and sin side by side [64, 32]."""
    generator = torch.Generator().manual_seed(0)
    x, *tables = (torch.randn(size, generator=generator) for size in ((rows, 1, 2, 16), (64, 32), (64, 32)))
    return x, torch.randint(min(rows, 64), (rows, 1), generator=generator), *tables


def factors(table: Tensor, positions: Tensor, lookup: Lookup = Tensor.__getitem__) -> tuple[Tensor, Tensor]:
    """As torchtune looks them up: views of the rows, one for cos and one for sin."""
    rows = lookup(table, positions).view(-1, 1, 1, 32)
    return rows[..., :16], rows[..., 16:]


def rotated(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    y: Tensor = OPS.rope(x.sin(), *factors(table, positions))
    return y


def traced_graph(function: Function, *args: Tensor, tracing_mode: str = "fake") -> GraphModule:
    trace = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode=tracing_mode)
    graph: GraphModule = trace(*args)
    graph.graph.eliminate_dead_code()
    return graph


def rewritten(function: Function, *args: Tensor, tracing_mode: str = "fake") -> GraphModule:
    """After the rewrite; with the result of the graph before."""
    traced = traced_graph(function, *args, tracing_mode=tracing_mode)
    expected = traced(*(arg.clone() for arg in args))
    gather_tables_first(traced.graph)
    traced.graph.lint()
    traced.recompile()
    for got, right in zip(traced(*(arg.clone() for arg in args)), expected):
        assert torch.equal(got, right)
    return traced


def names(traced: GraphModule) -> list[str]:
    return [node.name for node in traced.graph.nodes]


def first_functions(traced: GraphModule, count: int) -> list[Node]:
    return [node for node in traced.graph.nodes if node.op == "call_function"][:count]


def test_rows_of_different_tables_are_gathered_first_in_their_order() -> None:
    def function(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor]:
        for table in tables:
            x = x + rotated(x, table, positions)
        return (x,)

    traced = rewritten(function, *inputs())
    found = first_functions(traced, 8)
    views = [ATEN.view.default, ATEN.slice.Tensor, ATEN.slice.Tensor]
    assert [node.target for node in found] == [INDEX, *views, INDEX, *views]
    # A formula may gather by itself: it need not find the rows in memory.
    assert not any(node.meta.get("inductor_realize_to_strides") for node in found)
    assert [found[index].args[0] for index in (0, 4)] == traced.graph.find_nodes(op="placeholder")[2:]


@pytest.mark.parametrize(
    "lookup",
    [
        lambda table, rows: table[rows],
        lambda table, rows: F.embedding(rows, table),
        lambda table, rows: table.index_select(0, rows[:, 0]),
        lambda table, rows: table[:, None][rows[:, 0]],  # of views of both
        lambda table, rows: table[rows[rows[:, 0]]][:, 0],  # of positions that are gathered
    ],
    ids=["index", "embedding", "index_select", "views", "twice"],
)
def test_equal_gathers_are_one(lookup: Lookup) -> None:
    def function(x: Tensor, positions: Tensor, table: Tensor, other: Tensor) -> tuple[Tensor]:
        for _ in range(3):
            q, k = (OPS.rope(t, *factors(table, positions, lookup)) for t in (x.sin(), x.cos()))
            x = x + q * k
        return (x,)

    traced = rewritten(function, *inputs())
    rotations = traced.graph.find_nodes(op="call_function", target=OPS.rope.default)
    assert len(rotations) == 6
    ((cos, sin),) = {node.args[1:3] for node in rotations}
    assert {cos, sin} <= {*first_functions(traced, 8)}


def test_gathers_of_constants_are_moved_with_them() -> None:
    *args, constant, _ = inputs()

    def function(x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return tuple(rotated(x.cos(), constant, positions) for _ in range(2))

    traced = rewritten(function, *args, tracing_mode="real")
    assert [node.op for node in traced.graph.nodes][:4] == ["placeholder"] * 2 + ["get_attr", "call_function"]
    assert [node.target for node in traced.graph.nodes].count(INDEX) == 1


@pytest.mark.parametrize("rows", [MOST_ROWS, MOST_ROWS + 1])
def test_large_gathers_stay(rows: int) -> None:
    def function(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        return (OPS.rope(x.sin().flatten(1), *(table[positions[:, 0]] for table in tables)),)

    args = inputs(rows)
    assert (names(rewritten(function, *args)) == names(traced_graph(function, *args))) == (rows > MOST_ROWS)


def test_gathers_of_unknown_size_stay() -> None:
    def function(x: Tensor, positions: Tensor, *tables: Tensor) -> Tensor:
        return rotated(rotated(x, tables[0], positions), tables[1], positions)

    traced = traced_graph(function, *inputs(), tracing_mode="symbolic")
    before = names(traced)
    gather_tables_first(traced.graph)
    assert names(traced) == before


def scaled_table(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    return tuple(rotated(x, table * 2, positions) for table in tables)


def later_positions(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    return tuple(rotated(x, table, (positions + 1) % 64) for table in tables)


def read_by_nothing_rotary(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.sin() * factors(table, positions)[0] for table in tables)


def read_by_an_operator_of_others(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    return tuple(others_rope(x.sin(), *factors(table, positions)) for table in tables)


def rotating_what_is_gathered(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    x, (cos, sin) = x.sin(), tables[0][:3, None, None].chunk(2, -1)
    return tuple(OPS.rope(factors(table, positions)[0], cos, sin) + x for table in tables)


def a_single_gather(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    y = x.sin()
    cos, sin = factors(tables[0], positions)
    return OPS.rope(y, cos, sin), OPS.rope(y.cos(), cos, sin)


def returned(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    found = [(x.sin(), *factors(tables[0], positions)) for _ in range(2)]
    return (*(OPS.rope(*each) for each in found), *(cos for _, cos, _ in found))


def behind_a_write(x: Tensor, positions: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    first = rotated(x, tables[1], positions)
    tables[0][:2].copy_(x.flatten(1)[:2])
    return first, rotated(x, tables[0], positions)


NEAR_MISSES = [
    scaled_table,
    later_positions,
    read_by_nothing_rotary,
    read_by_an_operator_of_others,
    rotating_what_is_gathered,
    a_single_gather,
    returned,
    behind_a_write,
]


@pytest.mark.parametrize("function", NEAR_MISSES, ids=[function.__name__ for function in NEAR_MISSES])
def test_other_gathers_stay(function: Function) -> None:
    args = inputs()
    assert names(rewritten(function, *args)) == names(traced_graph(function, *args))


def decoder(x: Tensor, positions: Tensor, matrix: Tensor, caches: Tensor, *tables: Tensor) -> Tensor:
    """A layer for each table; between the rotations of two lie more nodes than Inductor fuses across."""
    at = positions[:1, 0]
    for table, (k_cache, v_cache) in zip(tables, caches.unbind()):
        for _ in range(65):
            x = (x.flatten(1) @ matrix).view_as(x)
        q, both = x.transpose(1, 2), [t.transpose(1, 2) for _ in "qk" for t in factors(table, positions)]
        numbers = (None, None, None, 0.0, False, False, False, False, False)
        x = OPS.rope_cache_write(q, q, q, *both, k_cache, v_cache, at, at, *numbers).transpose(1, 2)
    return x


@pytest.mark.parametrize("is_shared", [True, False], ids=["one table", "tables of their own"])
def test_one_kernel_gathers_for_all_layers_of_a_decoder(pretended_kernel: None, is_shared: bool) -> None:
    x, positions, first, second = inputs()
    matrix = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    args = x, positions, matrix, torch.zeros(3, 2, 3, 2, 64, 16), first, first if is_shared else second, first
    expected = decoder(*(arg.clone() for arg in args))
    out, code = compiled_code(decoder, *args)
    # Products are added up in another order, 195 times in turn, by a matrix that keeps lengths.
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    calls = re.findall(r"^ +(cpp_fused\w*)\(", code[code.index("def call(") :], re.MULTILINE)
    assert sum("index" in call for call in calls) == 1
    assert re.search(r"index|extern_kernels", code[code.index("def call(") :])[0] == "index"
    assert code.count("rope_cache_write_out.default(") == 3
