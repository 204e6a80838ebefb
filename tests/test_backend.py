"""The backend: what torch.compile's arguments do, and what wrong ones say."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.custom_graph_pass import CustomGraphPass

import infuse
from infuse import backend
from infuse.report import SiteRecord
from infuse.settings import Settings
from tests.small_models import SITES, Block, HandWrittenNorm
from tests.tolerances import assert_close_to_fp64, error


@pytest.fixture
def records() -> Iterator[list[SiteRecord]]:
    found: list[SiteRecord] = []
    stop = backend.on_rewrite(found.extend)
    yield found
    stop()


def rewritten(records: list[SiteRecord]) -> dict[str, int]:
    return dict(Counter(record.kind for record in records if record.status == "rewritten"))


def test_torch_finds_the_backend_by_name() -> None:
    assert "infuse" in torch._dynamo.list_backends()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_is_rewritten_and_right(records: list[SiteRecord], dtype: torch.dtype) -> None:
    block = Block().to(dtype).eval()
    x = torch.randn(2, 6, 32, dtype=dtype)
    with torch.no_grad():
        eager, reference = block(x), Block().to(torch.float64)
        reference.load_state_dict(block.state_dict())
        got = torch.compile(block, backend="infuse", fullgraph=True)(x)
    assert rewritten(records) == SITES
    assert_close_to_fp64(got, eager, reference(x.double()))


def test_gradients_are_within_1e_5_in_float32(records: list[SiteRecord]) -> None:
    block, x = Block(), torch.randn(2, 6, 32, requires_grad=True)
    inputs = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    got = torch.autograd.grad(torch.compile(block, backend="infuse")(x).square().sum(), inputs)
    assert rewritten(records) == SITES
    assert max(error(mine, theirs) for mine, theirs in zip(got, expected)) < 1e-5


def test_dynamic_shapes_compile_once_and_stay_right() -> None:
    compiled_graphs: list[int] = []

    def count(gm: Any, inputs: Any) -> Any:
        compiled_graphs.append(1)
        return backend.infuse(gm, inputs)

    block = Block()
    compiled = torch.compile(block, backend=count, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 6), (3, 5), (4, 9)):
            x = torch.randn(batch, length, 32)
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert len(compiled_graphs) == 1


def test_options_of_the_stock_backend_do_the_same(records: list[SiteRecord]) -> None:
    block, x = Block(), torch.randn(1, 4, 32)
    compiled = torch.compile(block, options=infuse.options(patterns=["swiglu"]))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert rewritten(records) == {"swiglu": 1}


def test_mode_reaches_inductor() -> None:
    config = backend.inductor_config("max-autotune", {"epilogue_fusion": False, "infuse.kernels": "never"})
    stock = torch._inductor.list_mode_options("max-autotune")
    assert {**stock, "epilogue_fusion": False}.items() <= config.items()
    assert config["pre_grad_custom_pass"].settings == Settings(kernels="never")
    assert config["pre_grad_custom_pass"].max_autotune
    assert not backend.inductor_config(None, None)["pre_grad_custom_pass"].max_autotune


@pytest.mark.parametrize("given_by", ["options", "config"])
def test_a_pre_grad_pass_of_the_user_still_runs(records: list[SiteRecord], given_by: str) -> None:
    seen: list[int] = []

    def own_pass(graph: torch.fx.Graph) -> None:
        seen.append(len(graph.nodes))

    norm, x = HandWrittenNorm(16), torch.randn(3, 16)
    options = {"pre_grad_custom_pass": own_pass} if given_by == "options" else None
    patch = {} if options else {"pre_grad_custom_pass": own_pass}
    with torch.no_grad(), torch._inductor.config.patch(patch):
        torch.compile(norm, backend="infuse", options=options)(x)
    assert seen and rewritten(records) == {"rms_norm": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "fastest"}, ["mode", "'fastest'", "'max-autotune'"]),
        ({"options": {"infuse.kernel": "auto"}}, ["unknown setting 'kernel'", "'kernels'"]),
        ({"options": {"infuse.patterns": ["attn"]}}, ["attn", "'attention'"]),
        ({"options": {"epilogue": True}}, ["unknown option 'epilogue'", "epilogue_fusion"]),
        ({"options": {"epilogue_fusion": "yes"}}, ["epilogue_fusion", "str", "bool"]),
    ],
)
def test_wrong_arguments_name_what_was_got_and_expected(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(HandWrittenNorm(8), backend="infuse", **arguments)(torch.randn(2, 8))
    assert all(word in str(raised.value) for word in words), raised.value


def test_infuse_options_checks_at_once() -> None:
    with pytest.raises(ValueError, match="mode: got 'fastest'"):
        infuse.options("fastest")
    with pytest.raises(ValueError, match="unknown option 'kernel'"):
        infuse.options(kernel="auto")


def test_kernels_never_and_always_do_not_change_the_result_without_a_gpu() -> None:
    norm, x = HandWrittenNorm(16), torch.randn(3, 16)
    for kernels in ("never", "always"):
        torch._dynamo.reset()
        with torch.no_grad(), infuse.override(kernels=kernels):
            torch.testing.assert_close(torch.compile(norm, backend="infuse")(x), norm(x))


def test_freezing_hides_nothing(records: list[SiteRecord]) -> None:
    """Frozen graphs of torch 2.11 have no shapes on their nodes: the pass is handed the example inputs."""
    norm, x = HandWrittenNorm(16).eval(), torch.randn(3, 16)
    with torch.no_grad():
        out = torch.compile(norm, backend="infuse", options={"freezing": True})(x)
    torch.testing.assert_close(out, norm(x))
    assert rewritten(records) == {"rms_norm": 1}


def test_checkpointed_code_is_rewritten_too(records: list[SiteRecord]) -> None:
    norm, x = HandWrittenNorm(16), torch.randn(3, 16, requires_grad=True)

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)  # type: ignore[no-any-return]

    inputs = [x, norm.weight]
    expected = torch.autograd.grad(norm(x).square().sum(), inputs)
    got = torch.autograd.grad(torch.compile(checkpointed, backend="infuse")(x).square().sum(), inputs)
    assert rewritten(records) == {"rms_norm": 1}
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs)


def test_autocast_is_rewritten_and_right(records: list[SiteRecord]) -> None:
    block, x = Block().eval(), torch.randn(2, 6, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager, got = block(x), torch.compile(block, backend="infuse")(x)
    with torch.no_grad():
        reference = Block().double()
        reference.load_state_dict(block.state_dict())
        assert_close_to_fp64(got, eager, reference(x.double()))
    assert rewritten(records)["attention"] == 1


def test_strict_is_an_error_that_names_the_site() -> None:
    def half_statistics(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    with pytest.raises(BackendCompilerFailed, match=r"(?s)infuse.strict.*test_backend.py.*remedy"):
        torch.compile(half_statistics, backend="infuse", options={"infuse.strict": True})(
            torch.randn(4, 16, dtype=torch.bfloat16)
        )


class _UserPass(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return "mine"


def test_the_pass_is_one_cache_key_a_configuration() -> None:
    one = backend.InfusePass(Settings(), False)
    assert pickle.dumps(one) == pickle.dumps(backend.InfusePass(Settings(), False))
    assert pickle.loads(pickle.dumps(one)) == one
    others = [
        backend.InfusePass(Settings(strict=True), False),
        backend.InfusePass(Settings(), True),
        backend.InfusePass(Settings(), False, (_UserPass(),)),
    ]
    assert len({one.uuid(), *(other.uuid() for other in others)}) == 4
    assert backend.build_hash() in pickle.dumps(one).decode("latin1")
    assert backend.InfusePass(Settings(), False, (lambda graph: None,)).uuid() is None


def test_a_training_graph_is_told_from_an_inference_graph() -> None:
    seen: list[bool] = []

    def capture(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(backend.is_training(gm.graph))
        return gm.forward

    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    torch.compile(layer, backend=capture)(x)
    with torch.no_grad():
        torch.compile(layer, backend=capture)(x)
    torch._dynamo.reset()
    layer.requires_grad_(False)
    torch.compile(layer, backend=capture)(x)
    assert seen == [True, False, False]
