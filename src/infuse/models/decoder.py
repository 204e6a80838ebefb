"""A Llama-like decoder, or a range of its layers, from torchtune's modules; plain, since compiling makes it fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from infuse.models.config import ModelConfig, has_attention_bias, has_tied_head, rotates_halves
from infuse.models.extras import import_extra
from infuse.models.shard import Shard

modules = import_extra("torchtune.modules")
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
}


class ShardTransformerDecoder(modules.TransformerDecoder):  # type: ignore[misc, name-defined]
    """A torchtune TransformerDecoder that holds the layers of one shard, and caches for these only.

    `layers.0` is the shard's start_layer. Only the first shard has tok_embeddings, only the last norm and output.
    """

    def __init__(self, shard: Shard, **parts: Any) -> None:
        super().__init__(**parts)
        self.shard = shard

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        """Runs this shard's layers.

        tokens: [B, S] int64 on the first shard; on the others the hidden states [B, S, embed_dim] of the one before.
        mask: bool [B, S, T], true where a token may look; T is S, or the caches' length. None: causal, without caches
        only. input_pos: [B, S] or [S] int64, needed with caches.
        Returns logits [B, S, vocab_size] fp32 on the last shard, hidden states [B, S, embed_dim] on the others.
        Raises ValueError for S beyond max_seq_len, and for caches without mask or input_pos.
        """
        self._validate_inputs(tokens.shape[1], mask=mask, input_pos=input_pos)
        h: Tensor = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=input_pos)
        return self.unembed(h) if self.shard.is_last_layer else h


def GeneralMHA(config: ModelConfig, shard: Shard) -> ShardTransformerDecoder:
    """The decoder of this shard, with torch's initial weights in the default dtype and on the default device.

    What the configuration leaves open follows from shard.model_id: "qwen" takes torchtune's Qwen2 rotary embedding and
    a bias on q, k and v; others its plain or, given rope_scaling_factor, its Llama-3 scaled embedding, and no bias.
    Raises ValueError when the shard is of a model with another number of layers; NotImplementedError for Llama-3
    scaling on Qwen2.
    """
    if shard.n_layers != config.num_layers:
        got = f"got a shard of {shard.n_layers} layers and a configuration of {config.num_layers}"
        raise ValueError(f"GeneralMHA: {got}, expected the same number")
    rope = _rotary_embedding(config, shard.model_id)
    embedding = nn.Embedding(config.vocab_size, config.embed_dim) if shard.is_first_layer else None
    return ShardTransformerDecoder(
        shard,
        tok_embeddings=embedding,
        layers=nn.ModuleList(_layer(config, shard.model_id, rope) for _ in range(shard.num_layers)),
        max_seq_len=config.max_seq_len,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        norm=modules.RMSNorm(config.embed_dim, eps=config.norm_eps) if shard.is_last_layer else None,
        output=_head(config, shard, embedding) if shard.is_last_layer else None,
    )


def _rotary_embedding(config: ModelConfig, model_id: str) -> nn.Module:
    """One for all layers; its tables are fp32 whatever the weights are."""
    sizes: dict[str, Any] = {"dim": config.head_dim, "max_seq_len": config.max_seq_len, "base": config.rope_base}
    scaled = config.rope_scaling_factor is not None
    if rotates_halves(config, model_id):
        if scaled:
            raise NotImplementedError("GeneralMHA: got rope_scaling_factor on Qwen2, expected None")
        rope: nn.Module = import_extra("torchtune.models.qwen2").Qwen2RotaryPositionalEmbeddings(**sizes)
    elif scaled:
        rope = import_extra("torchtune.models.llama3_1").Llama3ScaledRoPE(
            **sizes,
            scale_factor=config.rope_scaling_factor,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
            old_context_len=config.rope_original_max_seq_len,
        )
    else:
        rope = modules.RotaryPositionalEmbeddings(**sizes)
    return rope


def _layer(config: ModelConfig, model_id: str, rope: nn.Module) -> nn.Module:
    layer: nn.Module = modules.TransformerSelfAttentionLayer(
        attn=_attention(config, has_attention_bias(config, model_id), rope),
        mlp=_mlp(config),
        sa_norm=modules.RMSNorm(config.embed_dim, eps=config.norm_eps),
        mlp_norm=modules.RMSNorm(config.embed_dim, eps=config.norm_eps),
    )
    return layer


def _attention(config: ModelConfig, bias: bool, rope: nn.Module) -> nn.Module:
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention: nn.Module = modules.MultiHeadAttention(
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        q_proj=nn.Linear(config.embed_dim, q_dim, bias=bias),
        k_proj=nn.Linear(config.embed_dim, kv_dim, bias=bias),
        v_proj=nn.Linear(config.embed_dim, kv_dim, bias=bias),
        output_proj=nn.Linear(q_dim, config.embed_dim, bias=config.attn_output_bias),
        pos_embeddings=rope,
        max_seq_len=config.max_seq_len,
        attn_dropout=config.attn_dropout,
    )
    return attention


def _mlp(config: ModelConfig) -> nn.Module:
    mlp: nn.Module = modules.FeedForward(
        gate_proj=nn.Linear(config.embed_dim, config.intermediate_dim, bias=config.mlp_bias),
        down_proj=nn.Linear(config.intermediate_dim, config.embed_dim, bias=config.mlp_bias),
        up_proj=nn.Linear(config.embed_dim, config.intermediate_dim, bias=config.mlp_bias),
        activation=_ACTIVATIONS[config.hidden_act](),
    )
    return mlp


def _head(config: ModelConfig, shard: Shard, embedding: nn.Module | None) -> Any:
    """A tied head shares the embedding's weight where the shard has both, and holds a copy of it otherwise."""
    if embedding is not None and has_tied_head(config, shard.model_id):
        return modules.TiedLinear(embedding)
    return nn.Linear(config.embed_dim, config.vocab_size, bias=False)
