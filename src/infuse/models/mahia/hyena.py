"""HyenaBlock: a gated causal convolution along the sequence, with attention behind it if asked for.

v, g = split(W_in norm(x));  x = x + W_out (silu(g) * conv(v))      conv: depthwise, over the last kernel_size rows
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from infuse.models.mahia.attention import MetaAttentionKernel
from infuse.models.mahia.causal_convolution import causal_convolution
from infuse.models.mahia.checks import require_features, require_mask, require_positive


class HyenaBlock(nn.Module):
    """x [B, L, D] -> [B, L, D], the residual included; L may be shorter than the kernel.

    use_attention: a MetaAttentionKernel without Fourier features follows. It is not causal, the convolution is.
    mask: bool [B, L], true where a row is no padding; the convolution takes padding for zeros, like what lies before
    the first row.
    Raises ValueError for sizes that are not positive and for an input of another shape.
    """

    def __init__(self, dim: int, kernel_size: int = 31, *, use_attention: bool = False) -> None:
        super().__init__()
        require_positive("HyenaBlock", dim=dim, kernel_size=kernel_size)
        self.dim = dim
        self.kernel_size = kernel_size
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, 2 * dim)
        self.conv = nn.Conv1d(dim, dim, kernel_size, groups=dim)  # its weights; causal_convolution computes
        self.proj_out = nn.Linear(dim, dim)
        self.attention = MetaAttentionKernel(dim, use_fourier=False) if use_attention else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        require_features("HyenaBlock", x, self.dim, (3,))
        require_mask("HyenaBlock", mask, x.shape[:2])
        value, gate = self.proj_in(self.norm(x)).chunk(2, -1)
        if mask is not None:
            value = value.masked_fill(~mask.unsqueeze(-1), 0.0)
        assert self.conv.bias is not None
        mixed = causal_convolution(value, self.conv.weight, self.conv.bias)
        out: Tensor = x + self.proj_out(F.silu(gate) * mixed)
        return out if self.attention is None else self.attention(out, mask)
