"""Subgraphs of higher-order operators: torch.compile's pre-grad pass runs on each as a graph of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from infuse import backend
from infuse.report import SiteRecord
from tests.small_models import SITES, Block, HandWrittenNorm
from tests.tolerances import error


@pytest.fixture
def records() -> Iterator[list[SiteRecord]]:
    found: list[SiteRecord] = []
    stop = backend.on_rewrite(found.extend)
    yield found
    stop()


def rewritten(records: list[SiteRecord]) -> dict[str, int]:
    return dict(Counter(record.kind for record in records if record.status == "rewritten"))


def in_checkpoint(block: Block) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(block, x, use_reentrant=False)


def in_branch(block: Block) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cond(x.sum() > -1e9, lambda y: block(y), lambda y: y * 2, (x,))


def in_nested_region(block: Block) -> Callable[[Tensor], Tensor]:
    region = torch.compiler.nested_compile_region(lambda y: block(y))
    return lambda x: region(x)


@pytest.mark.parametrize("wrap", [in_checkpoint, in_branch, in_nested_region])
def test_a_block_inside_is_rewritten_and_trains(
    wrap: Callable[[Block], Callable[[Tensor], Tensor]], records: list[SiteRecord]
) -> None:
    block, x = Block(), torch.randn(2, 6, 32, requires_grad=True)
    inputs = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    got = torch.autograd.grad(torch.compile(wrap(block), backend="infuse")(x).square().sum(), inputs)
    assert rewritten(records) == SITES
    assert max(error(mine, theirs) for mine, theirs in zip(got, expected)) < 1e-5


def test_a_loop_body_is_rewritten(records: list[SiteRecord]) -> None:
    norm, x = HandWrittenNorm(16), torch.randn(3, 16)

    def loop(x: Tensor) -> Tensor:
        start = (torch.zeros((), dtype=torch.int64), x)
        result: Tensor = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, norm(y)), start)[1]
        return result

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(loop, backend="infuse")(x), norm(norm(norm(x))))
    assert rewritten(records) == {"rms_norm": 1}


def test_under_vmap_a_site_is_refused_in_plain_words(records: list[SiteRecord]) -> None:
    norm, x = HandWrittenNorm(16), torch.randn(3, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(torch.vmap(norm), backend="infuse")(x), norm(x))
    assert [record.reason for record in records] == ["it lies inside torch.vmap"]
