"""Writes and mode switches between a site's operations; each refusal has a positive control."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.patterns.canonical import CanonicalGraph
from infuse.patterns.safety import Effects
from tests.patterns.capture import assert_same_results, capture

D = 8
Write = Callable[[Tensor], object]


def add_method(x: Tensor) -> object:
    return x.add_(1.0)


def multiply_operator(x: Tensor) -> object:
    x *= 2.0
    return x


def set_item(x: Tensor) -> object:
    x[0] = 1.0
    return x


def index_put(x: Tensor) -> object:
    return x.index_put_((torch.tensor([0]),), x.new_ones(()))


def copy(x: Tensor) -> object:
    return x.copy_(torch.ones_like(x))


def out_argument(x: Tensor) -> object:
    return torch.add(x, 1.0, out=x)


def in_place_activation(x: Tensor) -> object:
    return F.relu(x, inplace=True)


def positional_in_place_activation(x: Tensor) -> object:
    return F.elu(x, 1.0, True)


def function_with_an_underscore(x: Tensor) -> object:
    return torch.relu_(x)


def through_a_view(x: Tensor) -> object:
    return x.view(-1)[1:3].zero_()


def through_aten(x: Tensor) -> object:
    return torch.ops.aten.add_.Tensor(x, 1.0)


WRITES = (
    add_method,
    multiply_operator,
    set_item,
    index_put,
    copy,
    out_argument,
    in_place_activation,
    positional_in_place_activation,
    function_with_an_underscore,
    through_a_view,
    through_aten,
)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_write_to_x_between_square_and_product_is_refused(write: Write, place: str) -> None:
    def norm(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.0
        if place == "before":
            write(x)
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if place == "between":
            write(x)
        y = x * r
        if place == "after":
            write(x)
        return y, x

    captured = capture(norm, torch.randn(4, D))
    if place == "between":
        assert captured.counts == {}
        assert all("writes in place" in reason for reason in captured.refusals)
    else:
        assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("between", [False, True])
def test_write_to_the_gate_before_the_multiply_is_refused(between: bool) -> None:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        gate = gate * 1.0
        activation = F.silu(gate)
        if between:
            gate.zero_()
        return activation * up

    captured = capture(gated, torch.randn(4, D), torch.randn(4, D))
    assert captured.counts == ({} if between else {"swiglu": 1})
    assert_same_results(captured)


@pytest.mark.parametrize("between", [False, True])
def test_write_to_the_factor_that_is_read_last_is_allowed(between: bool) -> None:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        up = up * 1.0
        activation = F.silu(gate)
        if between:
            up.zero_()
        return activation * up

    captured = capture(gated, torch.randn(4, D), torch.randn(4, D))
    assert captured.counts == {"swiglu": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("between", [False, True])
def test_write_to_the_narrow_x_between_two_casts_of_it_is_refused(between: bool) -> None:
    def norm(x: Tensor) -> Tensor:
        x = x * 1.0
        r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        if between:
            x.add_(1.0)
        return (x.float() * r).to(x.dtype)

    captured = capture(norm, torch.randn(4, D).bfloat16())
    assert captured.counts == ({} if between else {"rms_norm": 1})
    assert_same_results(captured)


@pytest.mark.parametrize("between", [False, True])
def test_write_to_the_cache_before_it_is_read_is_allowed_and_later_refused(between: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        cache[:, :, :2] = k
        scores = q @ cache.mT
        if between:
            cache[:, :, :2] = v
        return torch.softmax(scores, -1) @ v.new_ones(2, 2, 6, D) + cache.sum()

    small = torch.randn(2, 2, 2, D)
    captured = capture(attention, small, small + 1, small + 2, torch.zeros(2, 2, 6, D))
    assert captured.counts == ({} if between else {"attention": 1})
    assert_same_results(captured)


def test_write_to_the_scores_is_read_as_a_new_value() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores += 1.0
        return torch.softmax(scores, -1) @ v

    q = torch.randn(2, 2, 4, D)
    captured = capture(attention, q, q + 1, q + 2)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


def test_write_to_another_tensor_in_between_is_allowed() -> None:
    def norm(x: Tensor, other: Tensor) -> Tensor:
        other = other * 1.0
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        other.add_(1.0)
        return x * r + other

    captured = capture(norm, torch.randn(4, D), torch.randn(4, D))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_result_that_is_written_to_later_is_its_own_tensor() -> None:
    def norm(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        z = y.to(torch.float32)  # the same tensor
        z.add_(1.0)
        return y, z

    captured = capture(norm, torch.randn(4, D))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_position_counter_that_nobody_reads_survives() -> None:
    # fx's dead code elimination would drop the call, because its result is not used.
    def step(x: Tensor, position: Tensor) -> Tensor:
        position.add_(1)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    captured = capture(step, torch.randn(4, D), torch.zeros(2))
    assert captured.counts == {"rms_norm": 1}
    assert "add_" in captured.targets()


@pytest.mark.parametrize("place", ["before", "between", "around"])
def test_autocast_switch_between_the_operations_is_refused(place: str) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        if place == "before":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                w = w @ w
        if place == "around":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if place == "between":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return x * r
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + w.sum()

    captured = capture(norm, torch.randn(4, D), torch.randn(D, D))
    if place == "between":
        assert captured.counts == {}
        assert "autocast or grad mode switch" in captured.refusals[0]
    else:
        assert captured.counts == {"rms_norm": 1}


def weighted_outside(x: Tensor, w: Tensor) -> Tensor:
    """The norm without autocast, its weight after that."""
    with torch.autocast("cpu", enabled=False):
        h = x.float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return w * h


def test_a_region_that_changes_nothing_does_not_separate() -> None:
    captured = capture(weighted_outside, torch.randn(4, D), torch.randn(D))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_a_second_region_of_the_same_dtype_does_not_separate() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            p = torch.softmax(q @ k.mT, -1)
            with torch.autocast("cpu"):
                return p @ v

    q = torch.randn(2, 2, 4, D)
    captured = capture(attention, q, q + 1, q + 2)
    assert captured.counts == {"attention": 1}
    assert_same_results(captured)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_region_inside_of_another_separates(dtype: torch.dtype | None) -> None:
    def norm(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                return x * r

    captured = capture(norm, torch.randn(4, D))
    assert captured.counts == {}
    assert "autocast or grad mode switch" in captured.refusals[0]


def test_autocast_around_the_graph_counts() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(weighted_outside, torch.randn(4, D), torch.randn(D))
    assert captured.counts == {}
    assert "autocast or grad mode switch" in captured.refusals[0]


def test_implicit_cast_by_autocast_is_made_explicit() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.softmax(q @ k.mT, -1) @ v

    q = torch.randn(2, 2, 4, D)
    captured = capture(attention, q, q + 1, q + 2)
    assert captured.counts == {"attention": 1}
    assert captured.operators()[0].args[0].meta["example_value"].dtype == torch.bfloat16  # type: ignore[union-attr]
    assert_same_results(captured)


@pytest.mark.parametrize("inside", [False, True])
def test_grad_mode_switch_between_the_operations_is_refused(inside: bool) -> None:
    def norm(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x + 1.0
            r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) if inside else y
        if not inside:
            r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * r + y

    captured = capture(norm, torch.randn(4, D, requires_grad=True), training=True)
    assert captured.counts == ({} if inside else {"rms_norm": 1})
    assert_same_results(captured, training=True)


def test_detached_statistic_is_not_looked_through_in_training() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + 1e-6)

    captured = capture(norm, torch.randn(4, D, requires_grad=True), training=True)
    assert captured.records == []
    captured = capture(norm, torch.randn(4, D))
    assert captured.counts == {"rms_norm": 1}
    assert_same_results(captured)


def test_unknown_operators_write_to_what_their_schema_says() -> None:
    library = torch.library.Library("infuse_test_safety", "FRAGMENT")
    library.define("touch(Tensor(a!) x, Tensor y) -> ()")
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    x.meta["example_value"], y.meta["example_value"] = torch.randn(2), torch.randn(2)
    call = graph.call_function(torch.ops.infuse_test_safety.touch.default, (x, y))
    graph.output(x)
    (write,) = Effects(CanonicalGraph(graph), ambient_grad=False).writes
    assert write.node is call
    assert write.storages == {x.meta["example_value"].untyped_storage()._cdata}
