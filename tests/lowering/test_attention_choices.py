"""Attention of few query rows: when the kernel runs, and what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import infuse
from infuse.lowering import attention_backends as backends
from infuse.lowering import decisions, inductor
from infuse.lowering.heuristics import attention as heuristics
from infuse.lowering.policy import place
from infuse.ops import library
from infuse.ops.attention import attention_ref
from infuse.settings import Settings
from tests.lowering.compiled import compiled_code
from tests.lowering.pretended_attention import forward_on_cpu

OPS = torch.ops.infuse
SCALE = 8.0**-0.5
KERNELS = [f"{kernel}_{config}" for kernel in ("decode", "forward") for config in (-1, 0, 1)]


@pytest.fixture
def cpu_kernel(implement_on_cpu: Callable[[str, Callable[..., Any]], None]) -> list[tuple[int, str, bool]]:
    """The kernel by its formula; configuration, kind of mask and sinks of each call."""
    calls: list[tuple[int, str, bool]] = []

    def run(q, k, v, mask, scale, is_causal, softcap, sinks, nan, config, splits, out):  # type: ignore[no-untyped-def]
        calls.append((config, "none" if mask is None else str(mask.dtype), sinks is not None))
        out.copy_(attention_ref(q, k, v, mask, scale, is_causal, softcap, sinks, "nan" if nan else "zeros"))

    implement_on_cpu("attention_decode_out", run)
    implement_on_cpu("attention_forward_out", forward_on_cpu)
    return calls


def inputs(queries: int = 2, keys: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, queries, 4, 8).transpose(1, 2).bfloat16()
    return q, torch.randn(2, 2, keys, 8).bfloat16(), torch.randn(2, 2, keys, 8).bfloat16()


def args(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Any) -> tuple[Any, ...]:
    return (q, k, v, mask, SCALE, False, *rest)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_kernel_gets_what_is_there(
    cpu_kernel: list[tuple[int, str, bool]], has_mask: bool, has_sinks: bool
) -> None:
    q, k, v = inputs()
    sinks = torch.randn(4) if has_sinks else None

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(24) < lengths[:, None, None, None]).expand(2, 1, 2, 24) if has_mask else None
        out: Tensor = OPS.attention(q * 1, k, v, mask, SCALE, False, 0.0, sinks)
        return out.transpose(1, 2).flatten(2) + 1

    lengths = torch.tensor([3, 24])
    with infuse.override(kernels="always"):
        out, code = compiled_code(step, q, k, v, lengths)
    torch.testing.assert_close(out, step(q, k, v, lengths), atol=2e-2, rtol=2e-2)
    assert cpu_kernel == [(-1, "torch.bool" if has_mask else "none", has_sinks)]
    assert "infuse_attention_decode" in code


def test_max_autotune_measures_kernels_beside_torchs_own(
    cpu_kernel: list[tuple[int, str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[set[str]] = []

    def measure(name: str, kernels: Any, formulas: Any, *rest: Any, **how: Any) -> dict[str, float]:
        timed.append({*kernels, *formulas})
        return {backends.DEFAULT: 1.0, "decode_-1": 1.2, "decode_1": 0.95 if rest[0][3] is not None else 1.05}

    monkeypatch.setattr(inductor, "measure", measure)
    q, k, v = inputs()
    mask = torch.ones(2, 1, 2, 24, dtype=torch.bool)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OPS.attention(*args(q, k, v, mask))  # type: ignore[no-any-return]

    def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OPS.attention(*args(q, k, v))  # type: ignore[no-any-return]

    for function, chosen in ((masked, "decode_1"), (unmasked, backends.DEFAULT)):
        decisions.clear()
        compiled_code(function, q, k, v, mode="max-autotune-no-cudagraphs")
        assert [decision.chosen for decision in decisions.decisions()] == [chosen]
    assert timed == [{backends.DEFAULT, *KERNELS}] * 2


def test_few_rows_that_are_known_to_run_well_are_not_measured(
    cpu_kernel: list[tuple[int, str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(heuristics, "inference", lambda *described: "decode_-1")
    compiled_code(lambda *tensors: OPS.attention(*args(*tensors)), *inputs(), mode="max-autotune-no-cudagraphs")
    (decision,) = decisions.decisions()
    assert (decision.chosen, decision.why) == ("decode_-1", "heuristic")


def test_the_policy_knows_what_the_kernels_cannot_do(cpu_kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    mask = torch.ones(2, 1, 2, 24, dtype=torch.bool)
    label = "decode_-1"

    def form(*given: Any, training: bool = False, **settings: Any) -> str:
        return place("attention", given, training, settings=Settings(**settings), max_autotune=False).overload

    monkeypatch.setattr(heuristics, "inference", lambda *described: label)
    odd = k.transpose(2, 3).contiguous().transpose(2, 3)
    for label in ("decode_-1", "forward_-1"):
        assert form(*args(q, k, v, mask)) == form(*args(q, k, v)) == "default"
        assert form(*args(q, k, v, mask, 0.0, None, "softmax")) == form(*args(q, k, v, None, 30.0)) == "default"
        for refused in (
            args(q.float(), k.float(), v.float(), mask),
            args(q, k, v, mask.double()),
            args(q, k, v, mask[..., :1]),
            args(q, k, v, mask, 0.0, None, "mean"),
            args(q, k, v, None, 0.0, torch.randn(4).double()),
            args(q, k, v, None, 0.0, None, "zeros", 0.1),
            args(q[..., :4], k[..., :4], v),
            args(q, odd, v),
        ):
            assert form(*refused) == "inline"
        assert form(*args(*inputs(queries=33))) == ("inline" if label == "decode_-1" else "default")
        wide = [torch.randn(1, 4, 2, 256).bfloat16() for _ in range(3)]
        assert form(*args(*wide)) == "default"
        with monkeypatch.context() as small:
            small.setattr(library, "capability", lambda device: (8, 6))
            assert form(*args(*wide)) == "inline"
        assert form(*args(q, k, v), training=True) == form(*args(q, k, v), kernels="never") == "inline"


CACHE = (1, 8, 2048, 128)


@pytest.mark.parametrize(
    ("q", "k", "mask", "expected"),
    [
        ((1, 32, 2, 128), CACHE, None, True),
        ((1, 32, 1, 128), CACHE, torch.bool, True),
        ((1, 32, 1, 128), CACHE, None, False),
        ((16, 32, 1, 128), (16, 8, 2048, 128), torch.bool, True),
        ((64, 3, 49, 128), (64, 1, 2048, 128), None, False),
        ((1, 32, 2, 128), (1, 32, 2048, 128), None, False),
        ((1, 32, 2, 128), (1, 8, 128, 128), None, False),
        ((1, 32, 2, 64), (1, 8, 2048, 64), None, False),
        ((1, 14, 1, 64), (1, 2, 2048, 64), torch.bool, True),
        ((1, 14, 1, 80), (1, 2, 2048, 80), torch.bool, False),
    ],
)
def test_without_a_measurement_few_rows_run_in_the_kernel_where_torch_reads_more(
    q: tuple[int, ...], k: tuple[int, ...], mask: torch.dtype | None, expected: bool
) -> None:
    site = heuristics.Site(q, k, mask, False, False)
    assert heuristics.decodes_well(site, (9, 0)) is expected
    assert not heuristics.decodes_well(site, (8, 6))


def test_few_rows_are_timed_beside_torchs_own_over_a_cache_that_is_half_full(
    implement_on_cpu: Callable[[str, Callable[..., Any]], None],
) -> None:
    """torch's SDPA makes numbers of a bool mask while it is traced; a kernel could skip what a mask hides."""
    half_full = torch.arange(24) < 12
    timed: list[bool] = []

    def run(q, k, v, mask, *rest):  # type: ignore[no-untyped-def]
        timed.append(bool((mask == half_full).all()))
        rest[-1].copy_(attention_ref(q, k, v, mask, SCALE, False))

    implement_on_cpu("attention_decode_out", run)
    implement_on_cpu("attention_forward_out", forward_on_cpu)
    q, k, v = inputs()
    mask = torch.rand(2, 1, 2, 24) < 0.5

    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return OPS.attention(*args(q, k, v, mask))  # type: ignore[no-any-return]

    out, _ = compiled_code(step, q, k, v, mask, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(out, step(q, k, v, mask), atol=2e-2, rtol=2e-2)
    (decision,) = decisions.decisions()
    assert set(decision.timings_ms) == {backends.DEFAULT, *KERNELS}
    assert timed.count(True) >= 3
    assert timed.count(False) == decision.chosen.startswith("decode")


def test_a_row_without_keys_is_nan_where_the_source_says_so(cpu_kernel: list[Any]) -> None:
    q, k, v = inputs()
    mask = torch.full((1, 1, 2, 24), -math.inf)
    with infuse.override(kernels="always"):
        out, _ = compiled_code(lambda q, k, v: OPS.attention(*args(q, k, v, mask, 0.0, None, "softmax")), q, k, v)
    assert out.isnan().all()


LONG, HEADS = (1, 32, 4096, 128), (1, 8, 4096, 128)


@pytest.mark.parametrize(
    ("q", "k", "more", "runs", "trains"),
    [
        (LONG, HEADS, {}, True, True),
        (LONG, HEADS, {"mask": torch.bool}, True, True),
        (LONG, HEADS, {"mask": torch.bfloat16}, False, False),
        (LONG, HEADS, {"mask": torch.float32, "only_formula": True}, True, True),
        (LONG, HEADS, {"has_dropout": True}, True, False),
        (LONG, HEADS, {"has_dropout": True, "only_formula": True}, True, True),
        ((1, 32, 512, 128), (1, 8, 512, 128), {}, False, False),
        ((1, 32, 512, 128), (1, 8, 16384, 128), {"mask": torch.bool}, True, True),
        ((1, 32, 4096, 80), (1, 8, 4096, 80), {}, False, False),
        ((1, 32, 4096, 64), (1, 8, 4096, 64), {}, True, True),
    ],
)
def test_many_rows_run_in_the_kernel_where_it_was_measured(
    q: tuple[int, ...], k: tuple[int, ...], more: dict[str, Any], runs: bool, trains: bool
) -> None:
    given = {"mask": None, "is_causal": False, "only_formula": False, **more}
    site = heuristics.Site(q, k, **given)
    assert heuristics.inference(site, (9, 0)) == ("forward_-1" if runs else "")
    assert heuristics.trains(site, (9, 0)) is trains
    assert heuristics.inference(site, (8, 0)) == ""
    assert not heuristics.trains(site, (8, 0))


@pytest.mark.parametrize(
    ("head_dim", "more", "label"),
    [
        (64, {}, "sdpa_cudnn"),
        (128, {}, ""),
        (64, {"is_causal": True}, ""),
        (64, {"mask": torch.bool}, ""),
        (64, {"only_formula": True}, ""),
    ],
)
def test_the_gradients_of_small_heads_that_see_every_key_are_cudnns(
    head_dim: int, more: dict[str, Any], label: str
) -> None:
    sizes = (16, 16, 4096, head_dim)
    given = {"mask": None, "is_causal": False, "only_formula": False, **more}
    assert heuristics.backward(heuristics.Site(sizes, sizes, **given)) == label


@pytest.mark.parametrize(
    ("k", "more", "trains"),
    [
        ((1, 2, 4096, 64), {}, False),  # Qwen2.5 0.5B
        ((1, 8, 4096, 64), {}, True),
        ((4, 2, 4096, 64), {}, True),
        ((1, 2, 16384, 64), {}, True),
        ((1, 2, 4096, 64), {"mask": torch.bool}, True),
        ((1, 2, 4096, 64), {"only_formula": True}, True),
    ],
)
def test_shared_heads_whose_ctas_would_leave_sms_idle_are_expanded(
    k: tuple[int, ...], more: dict[str, Any], trains: bool
) -> None:
    given = {"mask": None, "is_causal": True, "only_formula": False, **more}
    site = heuristics.Site((k[0], 14, k[2], 64), k, **given)
    assert heuristics.trains(site, (9, 0)) is trains
    assert heuristics.expands(site, (9, 0)) is not trains
    assert not heuristics.expands(site, (8, 0))
    assert not heuristics.expands(heuristics.Site(k, k, **given), (9, 0))
