"""What a shard's decoder is made of: only its own layers and ends, the rotary embedding and biases of its family."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.models.configs import CONFIG

pytest.importorskip("torchtune")

from infuse.models.decoder import GeneralMHA, ShardTransformerDecoder
from infuse.models.shard import Shard, split_layers, whole_model
from infuse.models.sharded import ShardedGeneralModel


def decoder(model_id: str = "m", **change: Any) -> ShardTransformerDecoder:
    return GeneralMHA(dataclasses.replace(CONFIG, **change), whole_model(model_id, 3))


def parts(model: ShardTransformerDecoder) -> set[str]:
    return {name.split(".")[0] for name, _ in model.named_parameters()}


def test_each_shard_holds_its_own_layers_and_ends() -> None:
    first, middle, last = (GeneralMHA(CONFIG, shard) for shard in split_layers("m", 3, 3))
    assert parts(first) == {"tok_embeddings", "layers"}
    assert parts(middle) == {"layers"}
    assert parts(last) == {"layers", "norm", "output"}
    assert all(len(model.layers) == 1 for model in (first, middle, last))


@pytest.mark.parametrize(
    ("model_id", "change", "kind"),
    [
        ("llama-3.1", {}, "RotaryPositionalEmbeddings"),
        ("llama-3.1", {"rope_scaling_factor": 8.0}, "Llama3ScaledRoPE"),
        ("qwen-2.5", {}, "Qwen2RotaryPositionalEmbeddings"),
        ("other", {}, "RotaryPositionalEmbeddings"),
    ],
)
def test_the_family_has_its_rotary_embedding_and_biases(model_id: str, change: dict[str, Any], kind: str) -> None:
    attention = decoder(model_id, **change).layers[0].attn
    assert type(attention.pos_embeddings).__name__ == kind
    biases = [getattr(attention, f"{name}_proj").bias is not None for name in ("q", "k", "v", "output")]
    assert biases == ([True, True, True, False] if "qwen" in model_id else [False] * 4)


def test_a_tied_head_is_the_embedding_where_both_are_and_a_copy_elsewhere() -> None:
    whole = decoder(tie_word_embeddings=True)
    assert "output" not in parts(whole)
    last = GeneralMHA(dataclasses.replace(CONFIG, tie_word_embeddings=True), Shard("m", 1, 2, 3))
    assert last.output.weight.shape == (CONFIG.vocab_size, CONFIG.embed_dim)
    hidden = torch.randn(1, 2, CONFIG.embed_dim)
    expected = whole.norm(hidden) @ whole.tok_embeddings.weight.T
    torch.testing.assert_close(whole.unembed(hidden), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [{}, {"rope_scaling_factor": 8.0}, {"model_type": "qwen2"}], ids=str)
def test_rotary_tables_stay_in_fp32(dtype: torch.dtype, change: dict[str, Any]) -> None:
    model = ShardedGeneralModel(dataclasses.replace(CONFIG, **change), whole_model("m", 3), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    tables = [buffer.dtype for name, buffer in model.named_buffers() if "pos_embeddings" in name]
    assert tables and set(tables) == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_a_shard_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="got a shard of 4 layers and a configuration of 3"):
        GeneralMHA(CONFIG, whole_model("m", 4))


def test_llama3_scaling_on_qwen2_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="rope_scaling_factor on Qwen2"):
        decoder("qwen", rope_scaling_factor=8.0)
