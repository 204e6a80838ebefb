"""Shadow verification: what is right passes in every family, what is wrong is refused, what cannot be run is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infuse
from infuse.ops import swiglu as swiglu_op
from infuse.patterns import passes, shadow_inputs, verify
from infuse.patterns.sites import Site
from infuse.report import SiteRecord
from infuse.settings import Settings
from tests.patterns.capture import MODES, capture, inline_overload
from tests.small_models import SITES, Block, HandWrittenNorm

VERIFY = Settings(verify="compile")
Change = Callable[[Site], Site]


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    verify.forget()
    yield
    verify.forget()


def records_of(function: Callable[..., Any], *args: Tensor, **keywords: Any) -> list[SiteRecord]:
    return capture(function, *args, settings=VERIFY, **keywords).records


def failures(function: Callable[..., Any], *args: Tensor, **keywords: Any) -> list[str]:
    """The reasons of refusals, after "shadow verification failed: "."""
    found = [record.reason for record in records_of(function, *args, **keywords) if record.status == "refused"]
    assert all(reason.startswith("shadow verification failed: ") for reason in found), found
    return [reason.removeprefix("shadow verification failed: ") for reason in found]


def spoil(monkeypatch: pytest.MonkeyPatch, kind: str, change: Change) -> None:
    """Makes the recogniser of a family answer with a changed site."""

    def spoiled(family: passes.Family) -> passes.Family:
        def match(view: Any, node: Any) -> Any:
            finding = family.match(view, node)
            return change(finding) if isinstance(finding, Site) else finding

        return dataclasses.replace(family, match=match) if family.kind == kind else family

    monkeypatch.setattr(passes, "FAMILIES", tuple(spoiled(family) for family in passes.FAMILIES))


def with_argument(name: str, value: object) -> Change:
    """A site with another value for one argument of its operator."""

    def change(site: Site) -> Site:
        names = [item.name for item in getattr(torch.ops.infuse, site.kind).default._schema.arguments]
        args = list(site.args)
        args[names.index(name)] = value(args[names.index(name)]) if callable(value) else value
        return dataclasses.replace(site, args=tuple(args))

    return change


@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
@pytest.mark.parametrize("place", [None, inline_overload])
def test_every_family_passes(dtype: torch.dtype, training: bool, dynamic: bool, place: Any) -> None:
    keywords = {"place": place} if place else {}
    x = torch.randn(2, 6, 32, dtype=dtype, requires_grad=training)
    records = records_of(Block().to(dtype), x, training=training, dynamic=dynamic, **keywords)
    assert {record.kind: 1 for record in records if record.status == "rewritten"} == SITES
    assert all(record.verified.startswith("verified: error ") for record in records)


def test_every_family_passes_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert failures(Block(), torch.randn(2, 6, 32)) == []

    def region(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.silu(F.linear(x, x)) * F.linear(x, x.flip(0))

    (record,) = records_of(region, torch.randn(8, 8))
    assert record.verified.startswith("verified: error")


def norm(x: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def causal(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def masked(q: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ q.transpose(-1, -2)) * 0.25
    scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_epsilon_is_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, training: bool) -> None:
    spoil(monkeypatch, "rms_norm", with_argument("eps", 2e-6))
    (failure,) = failures(norm, torch.randn(4, 16, dtype=dtype, requires_grad=training), training=training)
    assert failure.startswith("on tiny values, output 0: its error is")


def test_swapped_arguments_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "swiglu", lambda site: dataclasses.replace(site, args=(*site.args[1::-1], *site.args[2:])))
    assert "on random values" in failures(gated, torch.randn(4, 16), torch.randn(4, 16))[0]


def test_a_lost_mask_and_a_lost_scale_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, "attention", with_argument("is_causal", False))
        assert len(failures(causal, torch.randn(1, 2, 4, 8))) == 1
    with monkeypatch.context() as patch:
        spoil(patch, "attention", with_argument("scale", 0.5))
        assert len(failures(causal, torch.randn(1, 2, 4, 8))) == 1


def test_a_wrong_gradient_is_found_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    right = swiglu_op._SwiGLU.backward

    def wrong(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        dgate, *rest = right(ctx, dout)
        assert dgate is not None
        return (1.1 * dgate, *rest)

    monkeypatch.setattr(swiglu_op._SwiGLU, "backward", staticmethod(wrong))
    gate, up = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    assert "a gradient: its error is" in failures(gated, gate, up, training=True)[0]
    assert failures(gated, gate, up) == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_are_tried_with_rows_that_are_hidden_altogether(dtype: torch.dtype, training: bool) -> None:
    q = torch.randn(2, 2, 4, 8, requires_grad=training)
    mask = torch.rand(2, 1, 4, 4) < 0.5 if dtype == torch.bool else torch.randn(2, 1, 4, 4)
    records = records_of(masked, q, mask, training=training, place=inline_overload)
    assert [record.verified[:8] for record in records if record.status == "rewritten"] in ([], ["verified"])
    assert not [record for record in records if "shadow" in record.reason]


def test_what_gives_a_mask_its_sizes_is_no_mask() -> None:
    def flattened(q: Tensor) -> Tensor:
        heads = q.flatten(0, 1)
        mask = torch.linspace(-1, 1, 64).view(4, 4, 4)
        return F.scaled_dot_product_attention(heads, heads, heads, mask)

    assert failures(flattened, torch.randn(2, 2, 4, 8), dynamic=True) == []


def test_complex_numbers_are_tried() -> None:
    def rotated(x: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    records = records_of(rotated, torch.randn(2, 3, 4, 8), torch.polar(torch.ones(4, 4), torch.randn(4, 4)))
    assert [(record.kind, record.verified[:8]) for record in records] == [("rope", "verified")]


def test_a_site_that_reads_a_value_twice_is_tried_from_where_both_come() -> None:
    class Twice(nn.Module):
        """The statistic of the float32 copy, multiplied with the original."""

        def forward(self, x: Tensor) -> Tensor:
            h = x.float()
            return x * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)

    assert failures(Twice(), torch.randn(4, 16)) == []


def test_equal_sites_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    right = verify._run_case
    monkeypatch.setattr(verify, "_run_case", lambda trial, case: tried.append(case.name) or right(trial, case))
    records_of(nn.Sequential(*(HandWrittenNorm(16) for _ in range(4))), torch.randn(3, 16))
    assert len(tried) == len(shadow_inputs.cases("rms_norm"))


def test_what_cannot_be_run_is_said_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        report = infuse.explain(Block(64), torch.empty(1, 4, 64), options={"infuse.verify": "compile"})
    assert report.rewritten == SITES
    assert all(site.verified.startswith("not verified: there are no values on meta") for site in report.sites)
    monkeypatch.setattr(verify, "_CPU_BUDGET_BYTES", 1)
    (record,) = records_of(norm, torch.randn(3, 16))
    assert record.status == "rewritten" and record.verified.startswith("not verified: that would take about")


def test_random_numbers_are_as_without_it() -> None:
    x = torch.randn(3, 16)
    torch.manual_seed(5)
    records_of(norm, x)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_strict_makes_a_failure_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "rms_norm", with_argument("eps", 2e-6))
    options = {"infuse.strict": True, "infuse.verify": "compile"}
    with pytest.raises(infuse.StrictError, match="shadow verification failed: on tiny values"):
        infuse.explain(norm, torch.randn(4, 16), options=options)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES)
def test_every_family_passes_on_a_gpu(dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    x = torch.randn(2, 6, 32, dtype=dtype, device="cuda", requires_grad=training)
    assert failures(Block().to("cuda", dtype), x, training=training, dynamic=dynamic) == []


def test_values_keep_the_strides_of_the_example() -> None:
    for sizes, strides in (((2, 3), (1, 2)), ((4, 3), (0, 1)), ((2, 0, 3), (3, 3, 1)), ((), ())):
        made = shadow_inputs._laid_out(torch.randn(sizes), sizes, strides)
        assert (tuple(made.shape), made.stride()) == (sizes, strides)
