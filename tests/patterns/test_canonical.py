"""The canonical view: different spellings of an operation read alike, and what is not provable is not read at all."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from infuse.patterns.canonical import Call, CanonicalGraph
from infuse.patterns.metadata import MissingMetadata
from infuse.patterns.sizes import broadcasts_to, same_shape, same_size

Reading = tuple[str, dict[str, Any]]


def last_call(function: Callable[[Tensor], Any], x: Tensor) -> tuple[CanonicalGraph, Node]:
    """The canonical view of a captured function and its last call."""
    views: list[CanonicalGraph] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        views.append(CanonicalGraph(module.graph))
        return module

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(x)
    return views[0], [node for node in views[0].nodes if node.op.startswith("call_")][-1]


def read(function: Callable[[Tensor], Any], x: Tensor) -> Reading | None:
    """Name and arguments, nodes among them left out."""
    view, node = last_call(function, x)
    call = view.call(node)
    if call is None:
        return None
    return call.name, {key: value for key, value in call.args.items() if not isinstance(value, Node)}


X = torch.randn(2, 3, 4, 5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.mean(x, -1, True),
        lambda x: x.mean(dim=-1, keepdim=True),
        lambda x: x.mean((-1,), keepdim=True),
        lambda x: x.mean([3], True),
        lambda x: torch.mean(x, dim=3, keepdim=True),
        lambda x: torch.ops.aten.mean.dim(x, [-1], True),
    ],
)
def test_means_read_alike(function: Callable[[Tensor], Any]) -> None:
    assert read(function, X) == ("mean", {"dim": (3,), "keepdim": True})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.transpose(-1, -2),
        lambda x: x.transpose(2, 3),
        lambda x: torch.transpose(x, -2, -1),
        lambda x: x.swapaxes(2, -1),
        lambda x: torch.swapdims(x, 3, 2),
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: x.permute([0, 1, 3, 2]),
        lambda x: torch.permute(x, (0, 1, -1, -2)),
        lambda x: x.movedim(-1, -2),
        lambda x: torch.moveaxis(x, (3,), (2,)),
        lambda x: x.mT,
        lambda x: x.adjoint(),
        lambda x: torch.ops.aten.transpose.int(x, -1, 2),
    ],
)
def test_transpositions_read_alike(function: Callable[[Tensor], Any]) -> None:
    assert read(function, X) == ("permute", {"dims": (0, 1, 3, 2)})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(2, 3, 20),
        lambda x: x.reshape((2, 3, -1)),
        lambda x: torch.reshape(x, [2, 3, 20]),
        lambda x: x.flatten(2),
        lambda x: torch.flatten(x, 2, 3),
        lambda x: x[:, None],
        lambda x: x[None, ..., None],
        lambda x: x.unsqueeze(0),
        lambda x: x.unflatten(3, (5, 1)),
        lambda x: torch.ops.aten.view.default(x, [6, 20]),
    ],
)
def test_reshapings_read_alike(function: Callable[[Tensor], Any]) -> None:
    assert read(function, X) == ("reshape", {})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.to(dtype=torch.float64),
        lambda x: x.double(),
        lambda x: x.type(torch.float64),
        lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
        lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
        lambda x: torch.ops.aten._to_copy.default(x, dtype=torch.float64),
        lambda x: torch.ops.prims.convert_element_type.default(x, torch.float64),
    ],
)
def test_casts_read_alike(function: Callable[[Tensor], Any]) -> None:
    assert read(function, X) == ("cast", {})


@pytest.mark.parametrize(
    "function", [lambda x: x.long(), lambda x: x.bool(), lambda x: x.to(torch.int32), lambda x: x.to(torch.complex64)]
)
def test_conversions_are_no_casts(function: Callable[[Tensor], Any]) -> None:
    assert read(function, X) == ("convert", {})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.type_as(x),
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout(x, p=0.0),
        lambda x: torch.dropout(x, 0.0, True),
    ],
)
def test_what_changes_nothing_reads_as_alias(function: Callable[[Tensor], Any]) -> None:
    found = read(function, X)
    assert found is not None
    assert found[0] == "alias"


def test_detach_changes_the_gradient() -> None:
    assert read(lambda x: x.detach(), torch.randn(2, requires_grad=True)) == ("detach", {})


def test_dropout_that_drops_is_dropout() -> None:
    found = read(lambda x: F.dropout(x, 0.1), X)
    assert found is not None
    assert found[0] == "dropout"


def test_view_of_the_bits_is_no_reshape() -> None:
    assert read(lambda x: x.view(torch.int32), X) is None


def test_conversion_that_moves_to_another_device_is_no_cast() -> None:
    assert read(lambda x: x.to("meta"), X) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1).mul_(2.0),
        lambda x: operator.imul(x + 1, 2.0),
        lambda x: torch.mul(x, 2.0, out=torch.empty_like(x)),
        lambda x: F.silu(x + 1, inplace=True),
        lambda x: torch.rsqrt(x, out=torch.empty_like(x)),
    ],
)
def test_writing_forms_are_not_canonical(function: Callable[[Tensor], Any]) -> None:
    assert read(function, X) is None


def test_writing_form_of_a_word_is_remembered() -> None:
    view, node = last_call(lambda x: F.silu(x + 1, inplace=True), X)
    assert view.in_place == {node: "silu"}


def test_factor_on_an_operand_is_no_plain_sum() -> None:
    view, node = last_call(lambda x: torch.add(x, x, alpha=2), X)
    assert view.operands(node, "add") is None
    view, node = last_call(lambda x: torch.add(x, x), X)
    assert view.operands(node, "add") is not None


def test_integer_division_is_no_quotient() -> None:
    view, node = last_call(lambda x: torch.div(x, 2.0, rounding_mode="floor"), X)
    assert view.operands(node, "div") is None


@pytest.mark.parametrize("order", [lambda x: 1 + x, lambda x: x + 1, lambda x: x.add(1), lambda x: torch.add(1, x)])
def test_number_may_stand_on_either_side(order: Callable[[Tensor], Any]) -> None:
    view, node = last_call(order, X)
    operands = view.operands(node, "add")
    assert operands is not None
    assert [view.number(operand) for operand in operands].count(1.0) == 1


def test_widening_casts_are_looked_through_and_narrowing_ones_are_not() -> None:
    half = X.bfloat16()
    view, node = last_call(lambda x: x.clone().float().contiguous(), half)
    assert view.strip(node, widening=True).op == "placeholder"
    assert view.strip(node).target == "float"
    view, node = last_call(lambda x: x.bfloat16().float(), X)
    assert view.strip(node, widening=True).target == "bfloat16"


def test_aten_graph_reads_as_the_torch_graph() -> None:
    graph = make_fx(lambda x: torch.softmax(x.pow(2).mean(-1, keepdim=True).rsqrt(), 1), tracing_mode="fake")(X).graph
    view = CanonicalGraph(graph)
    names = [call.name for node in view.nodes if isinstance(call := view.call(node), Call)]
    assert names[:3] == ["pow", "mean", "rsqrt"]


def test_missing_metadata_is_an_error_and_not_a_guess() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.rsqrt, (x,))
    graph.output(node)
    view = CanonicalGraph(graph)
    assert view.word(node) == "rsqrt"
    with pytest.raises(MissingMetadata, match="rsqrt"):
        view.tensor(node)


def test_sizes_are_compared_without_guards() -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    a, b = mode.from_tensor(torch.ones(8, 8), symbolic_context=context).shape
    before = len(env.guards)
    assert same_size(a, a)
    assert same_size(a * 2, a + a)
    assert not same_size(a, b)
    assert not same_shape((a, 1), (b, 1))
    assert broadcasts_to((1, a), (b, a))
    assert not broadcasts_to((a, a), (b, a))
    assert len(env.guards) == before
