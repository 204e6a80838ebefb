"""Named problems that tests, benchmarks and tuning share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm of x [*leading, row_size]."""

    leading: tuple[int, ...]
    row_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.leading, self.row_size)


@dataclass(frozen=True, slots=True)
class Attention:
    """q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim], v [..., kv_len, v_head_dim]."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int


# Small enough for an fp64 reference on a CPU: odd sizes, one row, no rows, one element a row.
NORMS: dict[str, Norm] = {
    "one row": Norm((1,), 64),
    "decode": Norm((2, 1), 96),
    "odd sizes": Norm((3, 5), 33),
    "vector": Norm((), 48),
    "no rows": Norm((0, 4), 16),
    "rows of one": Norm((7,), 1),
    "q/k norm": Norm((2, 3, 4), 16),
}

ATTENTIONS: dict[str, Attention] = {
    "square": Attention(2, 4, 4, 8, 8, 16, 16),
    "grouped": Attention(2, 6, 2, 5, 7, 8, 8),
    "multi-query": Attention(1, 4, 1, 3, 9, 8, 8),
    "decode": Attention(2, 4, 2, 1, 12, 16, 16),
    "other v": Attention(1, 2, 2, 4, 6, 8, 12),
    "one by one": Attention(1, 1, 1, 1, 1, 4, 4),
}
