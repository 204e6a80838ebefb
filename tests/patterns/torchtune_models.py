"""torchtune's decoders, as small as they get."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def torchtune(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of that name with two layers, 4 heads and 2 of keys; the test is skipped without torchtune."""
    models = pytest.importorskip(f"torchtune.models.{name}")
    model: nn.Module = getattr(models, name)(
        vocab_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=16,
        intermediate_dim=48,
    )
    return model.to(dtype)
