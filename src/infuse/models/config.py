"""The sizes and choices of a Llama-like decoder under torchtune's names, and what a model's name says about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIVE = ("vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "max_seq_len", "intermediate_dim")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's configuration; `load_model_config` reads it from a Hugging Face folder.

    rope_scaling_factor: None for plain rotary frequencies; a number for Llama-3's, which the next three fields shape.
    attn_bias is of q, k and v; attn_output_bias of the projection after attention. sliding_window: a token sees that
    many tokens, itself included; None for all before it. attn_bias, tie_word_embeddings and model_type may be None,
    "not said": then the model's name decides (`has_attention_bias`, `has_tied_head`, `rotates_halves`).
    Raises ValueError for values that are out of range or contradict each other.
    """

    vocab_size: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    intermediate_dim: int
    num_layers: int
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_scaling_factor: float | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    attn_dropout: float = 0.0
    attn_bias: bool | None = None
    attn_output_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    torch_dtype: torch.dtype = torch.float32
    tie_word_embeddings: bool | None = None
    sliding_window: int | None = None
    model_type: str | None = None

    def __post_init__(self) -> None:
        for name in (*POSITIVE, "num_layers", "norm_eps", "rope_base", "rope_original_max_seq_len"):
            if not getattr(self, name) > 0:
                raise ValueError(f"config.{name}: got {getattr(self, name)}, expected more than 0")
        for whole, part in (("num_heads", "num_kv_heads"), ("embed_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                got = f"got {getattr(self, whole)} and {getattr(self, part)}"
                raise ValueError(f"config.{whole}, {part}: {got}, expected the first to be a multiple of the second")
        if self.head_dim % 2:
            raise ValueError(f"config.head_dim: got {self.head_dim}, expected an even number (rotary pairs)")
        self._check_choices()

    def _check_choices(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"config.hidden_act: got {self.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}")
        if self.torch_dtype not in DTYPES:
            raise ValueError(f"config.torch_dtype: got {self.torch_dtype}, expected one of {DTYPES}")
        if not 0 <= self.attn_dropout < 1:
            raise ValueError(f"config.attn_dropout: got {self.attn_dropout}, expected 0 <= attn_dropout < 1")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"config.sliding_window: got {self.sliding_window}, expected None or at least 1")
        if self.model_type == "llama" and self.sliding_window is not None:
            raise ValueError(f"config.sliding_window: got {self.sliding_window}, expected None: a Llama has no window")
        if self.rope_scaling_factor is None:
            return
        if self.rope_scaling_factor < 1:
            raise ValueError(f"config.rope_scaling_factor: got {self.rope_scaling_factor}, expected at least 1")
        if not 0 < self.rope_low_freq_factor < self.rope_high_freq_factor:
            got = f"got {self.rope_low_freq_factor} and {self.rope_high_freq_factor}"
            raise ValueError(f"config.rope_low_freq_factor, rope_high_freq_factor: {got}, expected 0 < low < high")


def rotates_halves(config: ModelConfig, model_id: str) -> bool:
    """Whether rotary pairs are (i, i + head_dim / 2), as in torchtune's Qwen2, rather than (2i, 2i + 1)."""
    if config.model_type is not None:
        return config.model_type == "qwen2"
    return "qwen" in model_id.lower()


def has_attention_bias(config: ModelConfig, model_id: str) -> bool:
    """Whether q, k and v have a bias: as the configuration says, otherwise as Qwen2 has and others have not."""
    return rotates_halves(config, model_id) if config.attn_bias is None else config.attn_bias


def has_tied_head(config: ModelConfig, model_id: str) -> bool:
    """Whether the head is the embedding: as the configuration says, otherwise for Llama 3.2 and Qwen2 0.5B."""
    if config.tie_word_embeddings is not None:
        return config.tie_word_embeddings
    name = model_id.lower()
    return ("llama" in name and "3.2" in name) or ("qwen" in name and "0.5b" in name)
