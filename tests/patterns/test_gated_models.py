"""Gated MLPs of published models, tiny and with random weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infuse.patterns.passes import rewrite
from infuse.report import SiteRecord
from infuse.settings import Settings
from tests.patterns.capture import default_overload

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "num_local_experts": 2, "moe_intermediate_size": 24}
T5 = {"feed_forward_proj": "gated-gelu", "d_model": 16, "d_kv": 8, "d_ff": 24}
# (configuration, what it needs besides, activation, gated MLPs)
MODELS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "llama": ("LlamaConfig", {}, "silu", 2),
    "gemma": ("GemmaConfig", {}, "gelu_tanh", 2),
    "gemma2": ("Gemma2Config", {}, "gelu_tanh", 2),
    "gemma3": ("Gemma3TextConfig", {}, "gelu_tanh", 2),
    "phi3": ("Phi3Config", {}, "silu", 2),
    "mixtral": ("MixtralConfig", EXPERTS, "silu", 2),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS, "silu", 2),
    "gpt_oss": ("GptOssConfig", EXPERTS, "quick_gelu", 2),
    "modernbert": ("ModernBertConfig", {"global_attn_every_n_layers": 1}, "gelu_erf", 2),
    "t5 v1.1": ("T5Config", {**T5, "num_decoder_layers": 1}, "gelu_tanh", 3),
}


def rewritten(model: nn.Module, training: bool, **inputs: Any) -> tuple[list[SiteRecord], Counter[str]]:
    """Gates in all graphs of a model: the records, and the activations of the operators."""
    records: list[SiteRecord] = []
    activations: Counter[str] = Counter()

    def backend(module: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        before = torch.fx.GraphModule(module, module.graph)
        records.extend(rewrite(module.graph, Settings(patterns=("swiglu",)), default_overload, training))
        activations.update(
            str(node.args[2]) for node in module.graph.nodes if str(node.target).startswith("infuse.swiglu")
        )
        module.recompile()
        return before.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend=backend)(**inputs)
    return records, activations


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gated_mlps_of_hugging_face_models(name: str, training: bool) -> None:
    kind, more, activation, count = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **more})
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").train(training)
    tokens = torch.arange(6).view(1, 6) + 3
    inputs = {"input_ids": tokens, "use_cache": False}
    if name == "t5 v1.1":
        inputs["decoder_input_ids"] = tokens
    if name == "modernbert":
        del inputs["use_cache"]
    records, activations = rewritten(model, training, **inputs)
    assert [record.reason for record in records if record.status == "refused"] == []
    assert activations == {activation: count}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_in_each_implementation(name: str, implementation: str) -> None:
    kind, more, activation, _ = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **more, "num_hidden_layers": 1})
    model = transformers.AutoModel.from_config(config, experts_implementation=implementation)
    _, activations = rewritten(model, False, input_ids=torch.arange(6).view(1, 6), use_cache=False)
    assert set(activations) == {activation}


def test_torchtune_gemma_with_lora() -> None:
    gemma = pytest.importorskip("torchtune.models.gemma")
    model = gemma.lora_gemma(
        lora_attn_modules=["q_proj", "v_proj"],
        apply_lora_to_mlp=True,
        vocab_size=32,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        embed_dim=16,
        intermediate_dim=24,
        max_seq_len=16,
        lora_rank=2,
        lora_alpha=4,
    )
    records, activations = rewritten(model, True, tokens=torch.arange(6).view(1, 6))
    assert activations == {"gelu_tanh": 2}
    assert all(record.status == "rewritten" for record in records)
