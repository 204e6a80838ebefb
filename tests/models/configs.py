"""The configuration that the tests of the sharded decoders vary."""

from __future__ import annotations

from infuse.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64,
    embed_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_seq_len=64,
    intermediate_dim=96,
    num_layers=3,
)
