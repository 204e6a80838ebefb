"""MetaAttentionKernel: attention whose queries know a learned state that is carried along the sequence.

h = norm(x), plus Fourier features of it
s[t] = f[t] * s[t - 1] + (1 - f[t]) * u[t]          f = sigmoid(W_f h), one a head; u = W_u h
x + W_o softmax(q k^T / sqrt(head_dim)) v           q = W_q (h + s), k = W_k h, v = W_v h
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.models.mahia.checks import require_features, require_mask, require_positive
from infuse.models.mahia.decayed_sum import decayed_sum
from infuse.models.mahia.full_precision import widened
from infuse.models.mahia.opt_in import opt_in

_HEAD_DIM = 64


class FourierFeatures(nn.Module):
    """x [..., D] -> W [sin(P x), cos(P x)], same shape, with learned phases; the curves are computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        num_frequencies = max(1, dim // 2)
        self.phases = nn.Linear(dim, num_frequencies)
        self.out = nn.Linear(2 * num_frequencies, dim)

    def forward(self, x: Tensor) -> Tensor:
        phases: Tensor = self.phases(x)
        wide = widened(phases)
        out: Tensor = self.out(torch.cat((wide.sin(), wide.cos()), -1).to(phases.dtype))
        return out


class MetaAttentionKernel(nn.Module):
    """x [B, L, D] -> [B, L, D], the residual included. Every position attends to every other; the state runs forwards.

    mask: bool [B, L], true where a row is no padding, which neither attention nor state reads; what it gives in the
    padding's own place means nothing.
    use_fourier: add Fourier features to what attention reads. during_distillation: hold the state's update fixed, so
    that a distillation loss trains the attention alone; may be set later, too. num_heads: by default heads of 64
    features, or one head where those don't divide dim.
    Raises ValueError for sizes that are not positive or don't divide, and for an input of another shape.
    """

    def __init__(
        self,
        dim: int,
        use_fourier: bool = True,
        during_distillation: bool = False,
        use_cuda_kernels: bool = False,
        *,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        require_positive("MetaAttentionKernel", dim=dim)
        self.dim = dim
        self.num_heads = (1 if dim % _HEAD_DIM else dim // _HEAD_DIM) if num_heads is None else num_heads
        require_positive("MetaAttentionKernel", num_heads=self.num_heads)
        if dim % self.num_heads:
            raise ValueError(
                f"MetaAttentionKernel: dim, num_heads: got {dim} and {num_heads}, expected dim to be a multiple"
            )
        self.during_distillation = during_distillation
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.fourier = FourierFeatures(dim) if use_fourier else None
        self.forget = nn.Linear(dim, self.num_heads)
        self.update = nn.Linear(dim, dim, bias=False)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        opt_in(self, use_cuda_kernels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        require_features("MetaAttentionKernel", x, self.dim, (3,))
        require_mask("MetaAttentionKernel", mask, x.shape[:2])
        h: Tensor = self.norm(x)
        if self.fourier is not None:
            h = h + self.fourier(h)
        q, k, v = (self._heads(tensor) for tensor in (self.q(h + self.state(h, mask)), self.k(h), self.v(h)))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            # Where all is padding any key will do: a softmax over none would be NaN.
            seen = mask | ~mask.any(-1, keepdim=True)
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        out: Tensor = torch.softmax(scores, -1) @ v
        out = self.out(out.transpose(1, 2).flatten(2))
        return x + out

    def state(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """The state at each position, [B, L, D], of normed inputs [B, L, D]; padding leaves it as it is."""
        logits: Tensor = self.forget(h).transpose(1, 2)  # [B, H, L]
        new, log_decay = self._heads(self.update(h)) * torch.sigmoid(-logits).unsqueeze(-1), F.logsigmoid(logits)
        if mask is not None:
            new = new.masked_fill(~mask[:, None, :, None], 0.0)
            log_decay = log_decay.masked_fill(~mask[:, None], 0.0)
        state: Tensor = decayed_sum(new, log_decay).transpose(1, 2).flatten(2)
        return state.detach() if self.during_distillation else state

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, D / H]"""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads
