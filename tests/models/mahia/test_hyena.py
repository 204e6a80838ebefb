"""HyenaBlock: the convolution against a loop over the past, and that it looks nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from infuse.models.mahia import HyenaBlock, MetaAttentionKernel
from tests.tolerances import error

DIM = 8


@pytest.mark.parametrize("kernel_size", [1, 4, 31])
def test_it_is_its_formula(kernel_size: int) -> None:
    block, x = HyenaBlock(DIM, kernel_size).double(), torch.randn(2, 9, DIM, dtype=torch.float64)
    both = block.proj_in(F.rms_norm(x, (DIM,), block.norm.weight, 1e-6))
    value, gate = both[..., :DIM], both[..., DIM:]
    taps = block.conv.weight[:, 0]  # [D, kernel_size], the last for the row itself
    mixed = block.conv.bias.expand(2, 9, DIM).clone()
    for back in range(min(kernel_size, 9)):
        mixed[:, back:] += taps[:, kernel_size - 1 - back] * value[:, : 9 - back]
    assert error(block(x), x + block.proj_out(F.silu(gate) * mixed)) < 1e-12


def test_it_sees_the_last_rows_only() -> None:
    block, x = HyenaBlock(DIM, 3).double(), torch.randn(1, 9, DIM, dtype=torch.float64)
    before = block(x)
    x[:, 4] += 1
    changed = (block(x) - before).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 2


def test_attention_follows_if_asked_for() -> None:
    block, x = HyenaBlock(DIM, 3, use_attention=True), torch.randn(1, 9, DIM)
    assert isinstance(block.attention, MetaAttentionKernel) and block.attention.fourier is None
    plain = HyenaBlock(DIM, 3)
    plain.load_state_dict(block.state_dict(), strict=False)
    torch.testing.assert_close(block(x), block.attention(plain(x)))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="HyenaBlock: kernel_size: got 0"):
        HyenaBlock(DIM, 0)
    with pytest.raises(ValueError, match=r"HyenaBlock: x: got shape \(9, 8\), expected \[B, L, 8\]"):
        HyenaBlock(DIM)(torch.zeros(9, DIM))
