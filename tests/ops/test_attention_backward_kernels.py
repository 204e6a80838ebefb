"""What the kernels of attention's gradients take, and why not the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from infuse.ops.attention_backward_kernels import can_backward
from infuse.ops.attention_operands import readable

BF16 = torch.bfloat16


def reason(dim: int = 64, dtype: torch.dtype = BF16, mask: Tensor | None = None, **options: Any) -> str:
    """For 5 queries and 7 keys."""
    q, k = torch.zeros(2, 4, 5, dim, dtype=dtype), torch.zeros(2, 2, 7, dim, dtype=dtype)
    return can_backward(q, k, k, mask, options.pop("scale", 0.125), **options)


@pytest.mark.parametrize("dim", [8, 64, 80, 256])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_what_is_taken(dim: int, dtype: torch.dtype) -> None:
    assert reason(dim, dtype) == ""
    for mask in (torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, 7, dtype=dtype), torch.zeros(2, 1, 1, 7)):
        assert reason(dim, dtype, mask) == ""
    assert reason(dim, dtype, softcap=30.0, dropout_p=0.5, sinks=torch.zeros(4), masked_rows="nan") == ""
    assert reason(dim, dtype, torch.ones(5, 7, dtype=torch.bool), masked_rows="softmax") == ""


def test_what_is_refused_says_why() -> None:
    learned = torch.zeros(5, 7, dtype=BF16, requires_grad=True)
    for refused, why in (
        (reason(dtype=torch.float32), "float32"),
        (reason(dim=76), "head_dim of 76"),
        (reason(dim=264), "head_dim of 264"),
        (reason(scale=torch.tensor(1.0)), "symbolic"),
        (reason(mask=learned), "gradient of a mask"),
        (reason(mask=torch.zeros(5, 7), masked_rows="softmax"), "lowered to the same number"),
        (reason(mask=torch.ones(5, 7, dtype=torch.bool), masked_rows="mean"), "mean of all values"),
        (reason(mask=torch.zeros(5, 7, dtype=torch.float64)), "float64"),
        (reason(mask=torch.ones(5, 1, dtype=torch.bool)), "broadcast over keys"),
        (reason(sinks=torch.zeros(4, dtype=torch.float64)), "sinks"),
    ):
        assert why in refused


def test_a_gradient_is_copied_only_where_it_cannot_be_read() -> None:
    heads = torch.randn(2, 5, 4, 64).to(BF16)
    for fits in (heads, heads.transpose(1, 2), heads[:, 1:]):
        assert readable(fits) is fits
    for odd in (heads[..., 1:41], heads.transpose(2, 3), heads[..., :1].expand_as(heads)):
        copy = readable(odd)
        assert copy is not odd and torch.equal(copy, odd) and copy.stride(-1) == 1
