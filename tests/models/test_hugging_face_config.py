"""config.json in the spellings of both generations of transformers, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from infuse.models.hugging_face_config import hugging_face_config, load_model_config
from tests.models.hugging_face import SIZES

LLAMA: dict[str, Any] = SIZES | {
    "model_type": "llama",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
OLD = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}, "torch_dtype": "bfloat16"}
NEW = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}, "dtype": "bfloat16"}


def write(folder: Path, keys: object) -> Path:
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize("rope", [OLD, NEW], ids=["old", "new"])
def test_both_spellings_are_read(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = load_model_config(write(tmp_path, LLAMA | rope))
    assert config == load_model_config(tmp_path / "config.json")
    assert (config.vocab_size, config.embed_dim, config.intermediate_dim, config.num_layers) == (64, 48, 96, 3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_seq_len) == (4, 2, 12, 128)
    assert (config.rope_base, config.rope_scaling_factor, config.rope_original_max_seq_len) == (5e5, 8.0, 32)
    assert (config.rope_low_freq_factor, config.rope_high_freq_factor) == (1.0, 4.0)
    assert (config.norm_eps, config.torch_dtype, config.hidden_act) == (1e-6, torch.bfloat16, "silu")
    assert (config.attn_bias, config.attn_output_bias, config.tie_word_embeddings) == (False, False, False)


def test_what_is_left_out_has_hugging_faces_defaults(tmp_path: Path) -> None:
    short = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "tie_word_embeddings")}
    config = load_model_config(write(tmp_path, short))
    assert (config.num_kv_heads, config.rope_base, config.rope_scaling_factor) == (4, 10_000.0, None)
    assert config.tie_word_embeddings is None and config.torch_dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "biases"),
    [
        ({"attention_bias": True}, (True, True)),
        ({"model_type": "qwen2"}, (True, False)),
        ({"model_type": "mistral"}, (False, False)),
    ],
)
def test_biases_are_those_of_the_architecture(
    tmp_path: Path, change: dict[str, Any], biases: tuple[bool, bool]
) -> None:
    config = load_model_config(write(tmp_path, LLAMA | change))
    assert (config.attn_bias, config.attn_output_bias) == biases


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, 8),
        ({"model_type": "mistral", "sliding_window": 128}, None),
        ({"model_type": "qwen2", "sliding_window": 8}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ({"model_type": "qwen2", "sliding_window": 8, "layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_the_window_counts_where_it_is_in_use(tmp_path: Path, change: dict[str, Any], window: int | None) -> None:
    assert load_model_config(write(tmp_path, LLAMA | change)).sliding_window == window


@pytest.mark.parametrize(
    "change",
    [
        {},
        NEW,
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "mistral", "sliding_window": 8, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, change: dict[str, Any]) -> None:
    config = load_model_config(write(tmp_path, LLAMA | change))
    assert load_model_config(write(tmp_path, hugging_face_config(config, "any"))) == config


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "rms_norm_eps", "max_position_embeddings"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"got no {key}, hidden_act;"):
        load_model_config(write(tmp_path, {k: v for k, v in LLAMA.items() if k not in (key, "hidden_act")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "48"}, "hidden_size: got '48', expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers: got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0, expected at least 1"),
        ({"hidden_size": 50}, "hidden_size, num_attention_heads: got '50 and 4'"),
        ({"num_key_value_heads": 3}, "num_kv_heads: got 4 and 3"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, expected true or false"),
        ({"hidden_act": "tanh"}, "hidden_act: got 'tanh'"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "dtype, torch_dtype: got"),
        (NEW | {"rope_theta": 1e4}, "rope_theta, rope_parameters.rope_theta: got"),
        (NEW | OLD | {"rope_scaling": {"rope_type": "default"}}, "rope_parameters, rope_scaling: got"),
        ({"rope_scaling": {"type": "llama3", "rope_type": "default"}}, "rope_scaling.rope_type, type: got"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "no rope_scaling.low_freq_factor, rope_scaling.high"),
        ({"rope_scaling": 8.0}, "rope_scaling: got 8.0, expected an object"),
        ({"rope_theta": "big"}, "rope_theta: got 'big', expected a number"),
        ({"layer_types": ["full_attention"]}, "layer_types, num_hidden_layers: got"),
    ],
)
def test_wrong_and_contradictory_keys_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model_config(write(tmp_path, LLAMA | change))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2', expected one of llama, qwen2, mistral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: got 'yarn'"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "expected one kind in all layers",
        ),
    ],
)
def test_what_these_decoders_do_not_have_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        load_model_config(write(tmp_path, LLAMA | change))


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a config.json or a folder"):
        load_model_config(tmp_path)
    with pytest.raises(ValueError, match="with a list, expected a JSON object"):
        load_model_config(write(tmp_path, []))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        load_model_config(tmp_path)
