"""infuse::rope_cache_write: what it computes and writes, and that compiled code copies no cache because of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from infuse.ops import rope_cache_write as op
from infuse.ops.rms_norm import rms_norm_ref
from infuse.ops.rope import rope_ref

BATCH, HEADS, KV_HEADS, DIM, LENGTH, CACHE = 2, 4, 2, 8, 3, 11
FLAGS = (False, False, False, False)
OVERLOADS = ("default", "inline", "parts")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a kernel: the operator that writes stays whole, and its formula runs behind it."""
    monkeypatch.setattr(op.rope_kernels, "missing", lambda x: "")


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x = random(BATCH, LENGTH, HEADS + 2 * KV_HEADS, DIM).transpose(1, 2)
    q, k, v = x.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    tables = {name: random(LENGTH, DIM) for name in ("q_cos", "q_sin", "k_cos", "k_sin")}
    caches = {name: random(BATCH, KV_HEADS, CACHE, DIM) for name in ("k_cache", "v_cache")}
    positions = {"k_positions": torch.tensor([5, 0, 9]), "v_positions": torch.tensor([1, 2, -1])}
    return {"q": q, "k": k, "v": v, **tables, **caches, **positions, "q_weight": random(DIM), "k_weight": random(DIM)}


def call(overload: str, given: dict[str, Tensor], eps: float | None = 1e-6, flags: tuple[bool, ...] = FLAGS) -> Tensor:
    found: Tensor = getattr(torch.ops.infuse.rope_cache_write, overload)(*given.values(), eps, 0.0, True, *flags)
    return found


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("overload", OVERLOADS)
def test_is_norm_rotation_and_assignment(overload: str, eps: float | None) -> None:
    given = tensors()
    q, k = given["q"], given["k"]
    if eps is not None:
        q, k = (rms_norm_ref(x, given[f"{name}_weight"], eps, 0.0, True) for name, x in (("q", q), ("k", k)))
    expected_k, expected_v = given["k_cache"].clone(), given["v_cache"].clone()
    expected_k[:, :, [5, 0, 9]] = rope_ref(k, given["k_cos"], given["k_sin"])
    expected_v[:, :, [1, 2, 10]] = given["v"]
    torch.testing.assert_close(call(overload, given, eps), rope_ref(q, given["q_cos"], given["q_sin"]))
    torch.testing.assert_close(given["k_cache"], expected_k)
    assert torch.equal(given["v_cache"], expected_v)


def test_kernel_writes_into_what_it_is_given(kernel: None) -> None:
    given = tensors()
    expected = {name: value.clone() for name, value in given.items()}
    result = call("inline", expected)
    assert torch.equal(call("default", given), result)
    assert all(torch.equal(given[name], expected[name]) for name in given)


@pytest.mark.usefixtures("kernel")
def test_schema_says_what_is_written() -> None:
    given = tensors()
    positions = [given.pop(name) for name in ("k_positions", "v_positions")]
    weights = [given.pop(name) for name in ("q_weight", "k_weight")]
    caches = [given.pop(name) for name in ("k_cache", "v_cache")]
    args = (*given.values(), *positions, *weights, 1e-6, 0.0, True, *FLAGS, -1, *caches, torch.empty(given["q"].shape))
    torch.library.opcheck(torch.ops.infuse.rope_cache_write_out.default, args)


def test_refusals_say_what_was_got_and_expected() -> None:
    def refused(change: dict[str, Tensor]) -> str:
        with pytest.raises((ValueError, TypeError)) as caught:
            call("default", {**tensors(), **change})
        return str(caught.value)

    assert refused({"q": torch.randn(2, 3, 4)}).endswith("expected 4 [batch, heads, seq_len, D]")
    assert "k_cache: size of dimension 1: got 3, expected 2" in refused({"k_cache": torch.randn(2, 3, CACHE, DIM)})
    assert "k_positions: size: got 2, expected 3" in refused({"k_positions": torch.tensor([1, 2])})
    assert "v_positions: got dtype torch.bool" in refused({"v_positions": torch.tensor([True, True, False])})
    assert "expected one dtype" in refused({"v_cache": torch.randn(2, 2, CACHE, DIM, dtype=torch.float64)})


# --- compiled --------------------------------------------------------------------------------------------------------


def attention(q: Tensor, given: dict[str, Tensor]) -> Tensor:
    keys, values = (given[name].repeat_interleave(HEADS // KV_HEADS, 1) for name in ("k_cache", "v_cache"))
    return torch.softmax(q @ keys.transpose(-1, -2), -1) @ values


def compiled(function: Any, *args: Any) -> tuple[Any, str]:
    """(result, generated code) of Inductor alone, so that nothing but the operator is tested."""
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    return result, codes[-1]


def assert_no_cache_is_copied(code: str, writes: int) -> None:
    """One call for each write, and no buffer of a cache's size: each is one of the graph's inputs."""
    assert code.count("rope_cache_write_out.default(") == writes, code
    cache = f"({BATCH}, {KV_HEADS}, {CACHE}, {DIM})"
    allocations = [line for line in code.splitlines() if "empty_strided" in line and cache in line and "=" in line]
    assert allocations == [], allocations
    assert "auto_functionalized" not in code and ".clone(" not in code


def check_against_eager(function: Any, given: dict[str, Tensor], writes: int) -> None:
    def fresh() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in given.items()}

    eager, graph = fresh(), fresh()
    expected = function(eager)
    result, code = compiled(function, graph)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(graph, eager)
    assert_no_cache_is_copied(code, writes)


@pytest.mark.usefixtures("kernel")
def test_compiled_code_writes_in_place() -> None:
    check_against_eager(lambda given: attention(call("default", given), given), tensors(), 1)


@pytest.mark.usefixtures("kernel")
def test_compiled_code_reads_the_cache_before_and_after() -> None:
    def function(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        before = given["k_cache"].sum(2), given["v_cache"][:, :, 3] * 2
        q = call("default", given)
        return *before, attention(q, given), given["k_cache"].sum(2), given["v_cache"][:, :, 1] * 3

    check_against_eager(function, tensors(), 1)


@pytest.mark.usefixtures("kernel")
def test_compiled_layers_own_a_cache_each() -> None:
    def function(both: dict[str, Tensor]) -> Tensor:
        given = {name: value for name, value in both.items() if not name.endswith("2")}
        first = attention(call("default", given), given)
        own = {"q": given["q"] + first, "k": given["k"] + first[:, :KV_HEADS]}
        second = {**given, **own, "k_cache": both["k_cache2"], "v_cache": both["v_cache2"]}
        return attention(call("default", second), second)

    given = tensors()
    check_against_eager(function, {**given, "k_cache2": given["k_cache"] + 1, "v_cache2": given["v_cache"] - 1}, 2)


@pytest.mark.usefixtures("kernel")
def test_compiled_steps_write_one_cache_twice() -> None:
    def function(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        first = attention(call("default", given), given)
        again = {**given, "k": given["k"] * 2, "k_positions": given["k_positions"] + 1}
        return first, attention(call("default", again), again)

    check_against_eager(function, tensors(), 2)
