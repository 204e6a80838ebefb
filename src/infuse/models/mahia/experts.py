"""SparseMoETopK: each row goes to its top_k experts, of which each takes at most `capacity` rows (GShard, 2006.16668).

The shapes depend on the number of rows alone, so that nothing waits for data: rows are copied into one buffer
[E, capacity, D], which three batched products work on. First choices of all rows come before second ones; what finds
no place adds nothing to its row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infuse.models.mahia.checks import require_features, require_mask, require_positive
from infuse.models.mahia.full_precision import outside_autocast, widened


class Routing(NamedTuple):
    """probabilities [T, E] float32; weights [T, K], which sum to 1 a row; experts [T, K] int64, the likeliest first."""

    probabilities: Tensor
    weights: Tensor
    experts: Tensor


class SparseMoETopK(nn.Module):
    """x [B, D] or [B, L, D] -> the same shape, without the residual. Each expert is a gated MLP.

    capacity_factor: rows that an expert takes, relative to what it gets when all get the same. hidden_dim: by default
    2 dim. The router is computed in float32, outside autocast. mask: bool [B] or [B, L], true where a row is no
    padding, which no expert takes or counts; it gives zeros.
    Raises ValueError for sizes that are not positive, top_k above num_experts, and an input of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        top_k: int = 2,
        capacity_factor: float = 1.25,
        *,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = 2 * dim if hidden_dim is None else hidden_dim
        require_positive("SparseMoETopK", dim=dim, num_experts=num_experts, top_k=top_k, hidden_dim=hidden_dim)
        if top_k > num_experts:
            raise ValueError(f"SparseMoETopK: top_k: got {top_k}, expected at most num_experts={num_experts}")
        if not 0 < capacity_factor < math.inf:
            raise ValueError(f"SparseMoETopK: capacity_factor: got {capacity_factor}, expected a number above 0")
        self.dim, self.num_experts, self.top_k, self.capacity_factor = dim, num_experts, top_k, capacity_factor
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.gate, self.up = (nn.Parameter(_initial(num_experts, dim, hidden_dim)) for _ in range(2))
        self.down = nn.Parameter(_initial(num_experts, hidden_dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        require_features("SparseMoETopK", x, self.dim, (2, 3))
        require_mask("SparseMoETopK", mask, x.shape[:-1])
        rows = x.reshape(-1, self.dim)
        routing = self.route(rows)
        capacity = self.capacity(rows.shape[0])
        places = self._places(routing.experts, capacity, mask)
        # The last row takes all that found no place, and is left out.
        buffer = rows.new_zeros(self.num_experts * capacity + 1, self.dim)
        buffer = buffer.index_copy(0, places, rows.repeat(self.top_k, 1))
        done = self._experts(buffer[:-1].view(self.num_experts, capacity, self.dim)).flatten(0, 1)
        found = F.pad(done, (0, 0, 0, 1))[places].view(self.top_k, -1, self.dim)
        return (found * routing.weights.t().unsqueeze(-1)).sum(0).view(x.shape)

    def route(self, rows: Tensor) -> Routing:
        """Where rows [T, D] go."""
        with outside_autocast(rows.device):
            logits = F.linear(widened(rows), widened(self.router.weight))
        probabilities = torch.softmax(logits, -1)
        best, experts = _likeliest(probabilities, self.top_k)
        return Routing(probabilities, (best / best.sum(-1, keepdim=True)).to(rows.dtype), experts)

    def capacity(self, num_rows: int) -> int:
        """How many rows each expert takes, of num_rows."""
        return max(1, math.ceil(self.capacity_factor * num_rows * self.top_k / self.num_experts))

    def balance_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """A float32 scalar to add to the loss, 1 where all experts get the same (Switch Transformers, 2101.03961)."""
        require_features("SparseMoETopK.balance_loss", x, self.dim, (2, 3))
        require_mask("SparseMoETopK.balance_loss", mask, x.shape[:-1])
        probabilities, _, experts = self.route(x.reshape(-1, self.dim))
        shares = F.one_hot(experts, self.num_experts).to(probabilities.dtype).mean(1)
        if mask is None:
            return self.num_experts * (shares.mean(0) * probabilities.mean(0)).sum()
        counts = mask.reshape(-1, 1)
        total = (shares * counts).sum(0) * (probabilities * counts).sum(0)
        return self.num_experts * (total / counts.sum().clamp(min=1) ** 2).sum()

    def _places(self, experts: Tensor, capacity: int, mask: Tensor | None) -> Tensor:
        """The buffer's row for each choice of each row of x, [K * T] with all first choices first.

        With padding an expert takes as many rows as it would of a batch without it.
        """
        choices = experts.t().reshape(-1)
        chosen = choices == torch.arange(self.num_experts, device=choices.device).unsqueeze(1)  # [E, K * T]
        limit: Tensor | int = capacity
        if mask is not None:
            counts = mask.reshape(-1)
            share = self.capacity_factor * counts.sum().double() * self.top_k / self.num_experts
            chosen, limit = chosen & counts.repeat(self.top_k), share.ceil().clamp(min=1)
        order = chosen.cumsum(1).gather(0, choices.unsqueeze(0)).squeeze(0) - 1
        has_place = order < limit
        if mask is not None:
            has_place = has_place & counts.repeat(self.top_k)
        return torch.where(has_place, choices * capacity + order, self.num_experts * capacity)

    def _experts(self, rows: Tensor) -> Tensor:
        """[E, C, D] -> [E, C, D]"""
        return torch.bmm(F.silu(torch.bmm(rows, self.gate)) * torch.bmm(rows, self.up), self.down)


def _initial(num_experts: int, fan_in: int, fan_out: int) -> Tensor:
    """Weights as nn.Linear draws them."""
    return torch.empty(num_experts, fan_in, fan_out).uniform_(-(fan_in**-0.5), fan_in**-0.5)


def _likeliest(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As topk: values and indices [T, K], the highest first. One maximum after another fuses, which a sort does not."""
    every = torch.arange(probabilities.shape[-1], device=probabilities.device)
    left, found = probabilities.detach(), []
    for _ in range(count):
        found.append(left.argmax(-1, keepdim=True))
        left = left.masked_fill(every == found[-1], -1.0)
    experts = torch.cat(found, -1)
    return probabilities.gather(-1, experts), experts
