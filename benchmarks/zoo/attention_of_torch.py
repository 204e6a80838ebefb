"""Attention by torch's own modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.spelled import (
    DIM,
    HEADS,
    Register,
    tokens_and_more,
)

_plain = Register("attention")


def entries() -> list[Entry]:
    return _plain.entries


# torch's own modules


@_plain.add(attention=1)
class Multihead(nn.Module):
    need_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return result


@_plain.add(attention=1)
class MultiheadWithWeights(Multihead):
    """The weights are computed and averaged, and thrown away."""

    need_weights = True


@_plain.add(attention=1)
class MultiheadReturnsWeights(Multihead):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        result: tuple[Tensor, Tensor] = self.attention(x, x, x, need_weights=True)
        return result


@_plain.add(attention=1)
class MultiheadMasked(Multihead):
    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        padding = torch.zeros(x.shape[:2], dtype=x.dtype)
        result: Tensor = self.attention(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        return result


@_plain.add(inputs=tokens_and_more, attention=1)
class MultiheadCrossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True, kdim=DIM, vdim=DIM, batch_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        result: Tensor = self.attention(x, context, context, need_weights=False)[0]
        return result


@_plain.add(attention=1, layer_norm=2)
class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, HEADS, 48, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


@_plain.add(attention=1, layer_norm=2)
class EncoderLayerNormFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            DIM, HEADS, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        result: Tensor = self.layer(x, src_mask=mask, is_causal=True)
        return result


@_plain.add(inputs=tokens_and_more, attention=2, layer_norm=3)
class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(DIM, HEADS, 48, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        result: Tensor = self.layer(x, memory)
        return result


@_plain.add(inputs=tokens_and_more, attention=3, layer_norm=7)
class WholeTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(DIM, HEADS, 1, 1, 48, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        result: Tensor = self.model(x, target)
        return result
