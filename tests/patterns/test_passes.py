"""The rewrite as a whole: records, settings, metadata of new nodes, graphs that do not come from Dynamo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.patterns.passes import module_path, rewrite
from infuse.report import Placement, StrictError
from infuse.settings import Settings
from tests.patterns.capture import Captured, assert_same_results, capture, default_overload, inline_overload

DIM, HEADS, HEAD = 16, 2, 8


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM) * 0.3 + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, HEAD).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-2, -1) / HEAD**0.5, dim=-1)
        return (weights @ v).transpose(1, 2).reshape(batch, length, DIM)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(DIM, 24, bias=False), nn.Linear(DIM, 24, bias=False)
        self.w2 = nn.Linear(24, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(), Norm()
        self.attention, self.feed_forward = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.norm = Norm()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


COUNTS = {"rms_norm": 1, "add_rms_norm": 4, "swiglu": 2, "attention": 2}


def tokens(**kwargs: Any) -> Tensor:
    return torch.randn(2, 5, DIM, **kwargs)


@pytest.mark.parametrize("place", [default_overload, inline_overload])
@pytest.mark.parametrize(("training", "dynamic"), [(False, False), (True, False), (True, True)])
def test_decoder(place: Any, training: bool, dynamic: bool) -> None:
    captured = capture(Decoder(), tokens(), training=training, dynamic=dynamic, place=place)
    assert captured.counts == COUNTS
    assert captured.refusals == []
    assert_same_results(captured, training)


def test_records_name_module_source_and_spelling() -> None:
    captured = capture(Decoder(), tokens())
    assert [(record.kind, record.module) for record in captured.records[:4]] == [
        ("rms_norm", "layers.0.attention_norm"),
        ("attention", "layers.0.attention"),
        ("add_rms_norm", "layers.0.ffn_norm"),
        ("swiglu", "layers.0.feed_forward"),
    ]
    file, _, line = captured.records[1].source.rpartition(":")
    assert Path(file).name == "test_passes.py"
    assert "weights @ v" in Path(__file__).read_text().splitlines()[int(line) - 1]
    assert captured.records[1].spelling == "softmax(q k^T) v, scale"
    assert {record.status for record in captured.records} == {"rewritten"}
    assert {record.kernel for record in captured.records} == {"reference"}


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        ("L['self'].layers[0].norm", "layers.0.norm"),
        ("L['m'].layers.3._modules['attn'].k_norm", "layers.3.attn.k_norm"),
        ("L['self']", ""),
        ("", ""),
        ("model.layers.1", "model.layers.1"),
    ],
)
def test_module_path_is_the_models_own_name(stack: str, path: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"outer": ("L['self']", nn.Module), "inner": (stack, nn.Module)}
    assert module_path(node) == path


def test_place_is_asked_with_the_arguments_example_values() -> None:
    asked: list[tuple[str, tuple[object, ...], bool]] = []

    def place(kind: str, examples: tuple[object, ...], training: bool) -> Placement:
        asked.append((kind, examples, training))
        return Placement("default", "k")

    capture(Norm(), tokens().bfloat16(), training=True, place=place)
    ((kind, (x, weight, *numbers), training),) = asked
    assert (kind, training) == ("rms_norm", True)
    assert isinstance(x, Tensor)
    assert isinstance(weight, Tensor)
    assert (x.dtype, tuple(x.shape), weight.dtype) == (torch.bfloat16, (2, 5, DIM), torch.float32)
    assert numbers == [1e-6, 0.0, True, False]


def test_new_nodes_have_the_roots_metadata_and_their_own_value() -> None:
    captured = capture(Decoder(), tokens())
    for node in captured.rewritten.graph.nodes:
        if str(node.target).startswith("infuse."):
            assert node.meta["nn_module_stack"]
            assert "test_passes.py" in node.meta["stack_trace"]
        assert node.op == "output" or "example_value" in node.meta


def test_nothing_dead_is_left_and_nothing_else_is_removed() -> None:
    def model(x: Tensor, counter: Tensor) -> Tensor:
        counter.add_(1)
        return F.silu(x) * (x + 1)

    captured = capture(model, tokens(), torch.zeros(1))
    assert captured.targets() >= {"add_", "add", "swiglu.default"}
    assert "silu" not in captured.targets()
    dead = [node for node in captured.rewritten.graph.nodes if not node.users and node.op != "output"]
    assert [str(node.target) for node in dead] == ["add_"]


def test_families_that_are_not_wanted_stay() -> None:
    captured = capture(Decoder(), tokens(), settings=Settings(patterns=("swiglu",)))
    assert captured.counts == {"swiglu": 2}
    captured = capture(Decoder(), tokens(), settings=Settings(patterns=()))
    assert captured.records == []


def rereading(x: Tensor) -> Tensor:
    weights = torch.softmax(x @ x.mT, -1)
    return weights @ x + weights.sum() + F.rms_norm(x, (HEAD,), eps=1e-6)


def test_refusal_is_recorded_with_reason_and_remedy() -> None:
    captured = capture(rereading, torch.randn(1, 2, 3, HEAD))
    refused = [record for record in captured.records if record.status == "refused"]
    assert [(record.kind, record.kernel) for record in refused] == [("attention", "")]
    assert refused[0].reason
    assert refused[0].remedy
    assert captured.counts == {"rms_norm": 1}


def test_strict_makes_a_refusal_an_error_that_lists_the_sites() -> None:
    with pytest.raises(Exception, match="1 sites were refused.*\n.*attention.*read elsewhere.*remedy") as raised:
        capture(rereading, torch.randn(1, 2, 3, HEAD), settings=Settings(strict=True))
    assert isinstance(raised.value.__cause__ or raised.value, (StrictError, RuntimeError))
    assert capture(Decoder(), tokens(), settings=Settings(strict=True)).counts == COUNTS


def test_refused_family_that_is_not_wanted_is_no_strict_error() -> None:
    captured = capture(rereading, torch.randn(1, 2, 3, HEAD), settings=Settings(strict=True, patterns=("rms_norm",)))
    assert captured.counts == {"rms_norm": 1}


def without_metadata(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """As a pass leaves a graph that retraces it with fx, which Inductor's freezing does in torch 2.11."""
    return torch.fx.Transformer(module).transform()


def retraced(with_inputs: bool) -> tuple[torch.fx.GraphModule, list[Any], tuple[Any, ...]]:
    results: list[Any] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        bare = without_metadata(module)
        records = rewrite(bare.graph, Settings(), default_overload, False, tuple(inputs) if with_inputs else ())
        bare.recompile()
        results.append((bare, records))
        return lambda *values: (results.append(values), bare(*values))[1]

    with torch.no_grad():
        torch.compile(Decoder(1), backend=backend)(tokens())
    (module, records), values = results
    return module, records, values


def test_graph_without_metadata_is_completed_from_its_inputs() -> None:
    module, records, _ = retraced(with_inputs=True)
    assert [record.status for record in records] == ["rewritten"] * 5
    assert any(str(node.target) == "infuse.attention.default" for node in module.graph.nodes)


def test_graph_without_metadata_and_inputs_is_refused_and_never_silently_skipped() -> None:
    _, records, _ = retraced(with_inputs=False)
    assert [record.status for record in records] == ["refused"] * len(records)
    assert {record.kind for record in records} == {"rms_norm", "attention", "swiglu"}
    assert all("shapes and dtypes" in record.reason and record.remedy for record in records)


def test_node_that_a_pass_added_without_metadata_is_completed() -> None:
    def add_a_node(graph: torch.fx.Graph) -> None:
        (square,) = [node for node in graph.nodes if node.target == "pow"]
        with graph.inserting_after(square):
            twice = graph.call_function(torch.ops.aten.alias.default, (square,))
        square.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)

    captured = capture(Norm(), tokens(), before=add_a_node)
    assert captured.counts == {"rms_norm": 1}


def test_opaque_node_without_metadata_is_refused_by_name() -> None:
    def hide_the_weight(graph: torch.fx.Graph) -> None:
        (weight,) = [node for node in graph.nodes if "weight" in node.name]
        with graph.inserting_after(weight):
            opaque = graph.call_function(torch.ops.aten.floor.default, (weight,))
        weight.replace_all_uses_with(opaque, delete_user_cb=lambda user: user is not opaque)

    captured = capture(Norm(), tokens(), before=hide_the_weight)
    assert captured.counts == {}
    assert "floor" in captured.refusals[0]


def test_exported_graph_is_rewritten() -> None:
    model = Decoder().eval()
    x = tokens()
    exported = torch.export.export(model, (x,))
    expected = exported.module()(x)
    records = rewrite(exported.graph_module.graph, Settings(), default_overload, False)
    exported.graph_module.recompile()
    assert {record.status for record in records} == {"rewritten"}
    assert len(records) == sum(COUNTS.values())
    assert records[0].module == "layers.0.attention_norm"
    torch.testing.assert_close(exported.module()(x), expected)


def test_exported_half_precision_graph_loses_its_assertions_about_dead_casts() -> None:
    exported = torch.export.export(Norm().bfloat16(), (tokens().bfloat16(),))
    records = rewrite(exported.graph_module.graph, Settings(), default_overload, False)
    assert [record.status for record in records] == ["rewritten"]
    targets = [str(node.target) for node in exported.graph_module.graph.nodes]
    assert not any("pow" in target or "mean" in target for target in targets)


def test_rewriting_twice_changes_nothing() -> None:
    results: list[list[Any]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        results.append(rewrite(module.graph, Settings(), default_overload, False))
        results.append(rewrite(module.graph, Settings(), default_overload, False))
        module.recompile()
        return module

    torch.compile(Decoder(), backend=backend)(tokens())
    assert [len(records) for records in results] == [sum(COUNTS.values()), 0]


def test_rewrite_is_fast() -> None:
    seconds: list[float] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        start = time.perf_counter()
        rewrite(module.graph, Settings(), default_overload, False)
        seconds.append(time.perf_counter() - start)
        module.recompile()
        return module

    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(Decoder(4), backend=backend)(tokens())
    # About 0.04 s on a quiet core; torch.compile takes seconds for such a model.
    assert seconds[-1] < 0.5


def assert_graph(captured: Captured, expected: str) -> None:
    expecttest = pytest.importorskip("expecttest")
    expecttest.assert_expected_inline(str(captured.rewritten.graph).strip(), expected, skip=1)


def test_graph_of_a_norm() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)

    assert_graph(
        capture(norm, torch.randn(2, 4).bfloat16(), torch.ones(4)),
        """\
graph():
    %l_x_ : torch.Tensor [num_users=1] = placeholder[target=L_x_]
    %l_w_ : torch.Tensor [num_users=1] = placeholder[target=L_w_]
    %rms_norm_default : [num_users=1] = call_function[target=torch.ops.infuse.rms_norm.default](args = (%l_x_, %l_w_, 1e-06, 0.0, True, False), kwargs = {})
    return (rms_norm_default,)""",  # noqa: E501
    )


def test_graph_of_a_residual_add_and_norm() -> None:
    def block(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        total = x + residual
        return total + F.rms_norm(total, (4,), w, 1e-6)

    assert_graph(
        capture(block, torch.randn(2, 4), torch.randn(2, 4), torch.ones(4)),
        """\
graph():
    %l_x_ : torch.Tensor [num_users=1] = placeholder[target=L_x_]
    %l_residual_ : torch.Tensor [num_users=1] = placeholder[target=L_residual_]
    %l_w_ : torch.Tensor [num_users=1] = placeholder[target=L_w_]
    %add_rms_norm_default : [num_users=2] = call_function[target=torch.ops.infuse.add_rms_norm.default](args = (%l_x_, %l_residual_, %l_w_, 1e-06, 0.0, False, False), kwargs = {})
    %getitem : [num_users=1] = call_function[target=operator.getitem](args = (%add_rms_norm_default, 0), kwargs = {})
    %getitem_1 : [num_users=1] = call_function[target=operator.getitem](args = (%add_rms_norm_default, 1), kwargs = {})
    %add_1 : [num_users=1] = call_function[target=operator.add](args = (%getitem_1, %getitem), kwargs = {})
    return (add_1,)""",  # noqa: E501
    )


def test_graph_of_a_grouped_attention_with_a_mask() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return (torch.softmax(q @ k.mT * 0.5 + mask, -1) @ v).transpose(1, 2).contiguous()

    kv = torch.randn(1, 1, 3, 4)
    assert_graph(
        capture(attention, torch.randn(1, 2, 3, 4), kv, kv + 1, torch.zeros(3, 3)),
        """\
graph():
    %l_k_ : torch.Tensor [num_users=1] = placeholder[target=L_k_]
    %l_v_ : torch.Tensor [num_users=1] = placeholder[target=L_v_]
    %l_q_ : torch.Tensor [num_users=1] = placeholder[target=L_q_]
    %l_mask_ : torch.Tensor [num_users=1] = placeholder[target=L_mask_]
    %attention_default : [num_users=1] = call_function[target=torch.ops.infuse.attention.default](args = (%l_q_, %l_k_, %l_v_, %l_mask_, 0.5, False, 0.0, None, nan, 0.0, False), kwargs = {})
    %transpose : [num_users=1] = call_method[target=transpose](args = (%attention_default, 1, 2), kwargs = {})
    %contiguous : [num_users=1] = call_method[target=contiguous](args = (%transpose,), kwargs = {})
    return (contiguous,)""",  # noqa: E501
    )
