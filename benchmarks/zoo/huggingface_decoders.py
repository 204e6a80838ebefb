"""Hugging Face's decoders: language models, dense and with experts, state-space mixtures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.entry import Entry
from zoo.huggingface import family, padded_text, text

CAUSAL = "AutoModelForCausalLM"
# name: (configuration class, what differs)
_DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 64}),
    "falcon": ("FalconConfig", {}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": 4}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 4}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 4}),
    "granite": ("GraniteConfig", {}),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "nemotron": ("NemotronConfig", {}),
    "persimmon": ("PersimmonConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "helium": ("HeliumConfig", {}),
    "exaone4": ("Exaone4Config", {"sliding_window": 4}),
    "arcee": ("ArceeConfig", {}),
    "ministral": ("MinistralConfig", {"sliding_window": 4}),
    "seed_oss": ("SeedOssConfig", {}),
    "apertus": ("ApertusConfig", {}),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "gpt_bigcode": ("GPTBigCodeConfig", {}),
    "diffllama": ("DiffLlamaConfig", {}),
    "biogpt": ("BioGptConfig", {}),
    "minicpm3": (
        "MiniCPM3Config",
        {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
        | {"num_key_value_heads": 4},
    ),
    "nanochat": ("NanoChatConfig", {}),
}
# These know one implementation only.
_EAGER: dict[str, tuple[str, dict[str, Any]]] = {
    "vaultgemma": ("VaultGemmaConfig", {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    "bloom": ("BloomConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gptj": ("GPTJConfig", {"rotary_dim": 8}),
    "codegen": ("CodeGenConfig", {"rotary_dim": 8}),
    "mpt": ("MptConfig", {}),
    "gpt_neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "xglm": ("XGLMConfig", {"attention_heads": 4}),
    "openai-gpt": ("OpenAIGPTConfig", {}),
    "ctrl": ("CTRLConfig", {"dff": 96}),
    "gpt_oss": ("GptOssConfig", {"sliding_window": 4}),
}
_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {}),
    "olmoe": ("OlmoeConfig", {}),
    "phimoe": ("PhimoeConfig", {}),
    "granitemoe": ("GraniteMoeConfig", {}),
    "glm4_moe": ("Glm4MoeConfig", {"n_group": 1, "topk_group": 1}),
    "dots1": ("Dots1Config", {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
        | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
        | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8}
        | {"first_k_dense_replace": 1},
    ),
    "llama4": ("Llama4TextConfig", {"intermediate_size_mlp": 96, "attention_chunk_size": 4}),
    "minimax": ("MiniMaxConfig", {"block_size": 4}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "jamba": ("JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
}
_STATE_SPACE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 4}),
    "bamba": (
        "BambaConfig",
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 4},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 4, "mamba_d_state": 16},
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"block_types": ["recurrent", "attention"]}),
    "lfm2": ("Lfm2Config", {}),
    "rwkv": ("RwkvConfig", {}),
}


def entries() -> Iterator[Entry]:
    for name, (config, changes) in _DENSE.items():
        yield from family(name, config, CAUSAL, text(), **changes)
    for name, (config, changes) in _EAGER.items():
        yield from family(name, config, CAUSAL, text(), attentions=("eager",), **changes)
    for name, (config, changes) in _EXPERTS.items():
        yield from family(name, config, CAUSAL, text(), discrete=True, **changes)
    for name, (config, changes) in _STATE_SPACE.items():
        yield from family(name, config, CAUSAL, text(), attentions=("eager",), **changes)
    for name in ("llama", "gpt2", "qwen3", "gemma3"):
        config, changes = _DENSE[name]
        yield from family(f"{name}-padded", config, CAUSAL, padded_text(), **changes)
    yield from family("llama-dropout", "LlamaConfig", CAUSAL, text(), random=True, attention_dropout=0.1)
