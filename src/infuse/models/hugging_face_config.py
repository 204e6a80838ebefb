"""config.json of a Hugging Face checkpoint, read into a `ModelConfig` and written from one.

Both spellings are read: rope_theta, rope_scaling and torch_dtype of older files, rope_parameters and dtype of newer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infuse.models.config import DTYPES, ModelConfig, has_attention_bias, has_tied_head, rotates_halves

FILE = "config.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
_SIZES = {  # ours -> theirs; each must be there
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
}
_REQUIRED = ("model_type", *_SIZES.values(), "rms_norm_eps", "hidden_act")
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_ACTIVATION_NAMES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_model_config(path: str | Path) -> ModelConfig:
    """Reads config.json, given its path or its folder's.

    Raises FileNotFoundError; ValueError for a file that is no JSON object, for missing keys (all are named), values of
    a wrong type, and keys that contradict each other; NotImplementedError for an architecture or a rotary scaling that
    these decoders don't have.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"load_model_config: got {path}, expected a {FILE} or a folder that holds one")
    try:
        keys = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"load_model_config: got {file}, expected JSON: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"load_model_config: got {file} with a {type(keys).__name__}, expected a JSON object")
    return _convert(_Keys(file, keys))


def hugging_face_config(config: ModelConfig, model_id: str) -> dict[str, Any]:
    """What to write as config.json so that Hugging Face and `load_model_config` read this configuration back.

    Raises ValueError for biases that no Hugging Face architecture of these has.
    """
    model_type = _model_type(config, model_id)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling_factor is not None:
        values = (config.rope_scaling_factor, config.rope_low_freq_factor, config.rope_high_freq_factor)
        rope |= {"rope_type": "llama3", **dict(zip(_LLAMA3_KEYS, (*values, config.rope_original_max_seq_len)))}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.hidden_act,
        "attention_bias": has_attention_bias(config, model_id),
        "attention_dropout": config.attn_dropout,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": rope,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": 0,
        "tie_word_embeddings": has_tied_head(config, model_id),
        "dtype": str(config.torch_dtype).removeprefix("torch."),
    }


def _model_type(config: ModelConfig, model_id: str) -> str:
    if config.model_type is not None:
        name = config.model_type
    elif rotates_halves(config, model_id):
        name = "qwen2"
    else:
        name = "llama" if config.sliding_window is None else "mistral"
    biases = (has_attention_bias(config, model_id), config.attn_output_bias, config.mlp_bias)
    allowed = {"qwen2": [(True, False, False)], "mistral": [(False, False, False)]}
    if biases not in allowed.get(name, [(bias, bias, mlp) for bias in (False, True) for mlp in (False, True)]):
        got = "attn_bias={}, attn_output_bias={}, mlp_bias={}".format(*biases)
        raise ValueError(f"hugging_face_config: got {got}, which {ARCHITECTURES[name]} does not have; expected its own")
    return name


class _Keys:
    """The keys of one file, with errors that name the file and the key."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def error(self, key: str, got: object, expected: str) -> ValueError:
        return ValueError(f"{self.file}: {key}: got {got!r}, expected {expected}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def number(self, key: str, default: float) -> float:
        value = self.values[key] if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, value, "a number")
        return value

    def whole(self, key: str, default: int = 0) -> int:
        value = self.values[key] if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, value, "a whole number")
        return value

    def flag(self, key: str, default: bool | None) -> bool | None:
        value = self.values[key] if self.has(key) else default
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.values[key]
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value


def _convert(keys: _Keys) -> ModelConfig:
    missing = [key for key in _REQUIRED if not keys.has(key)]
    if missing:
        raise ValueError(f"{keys.file}: got no {', '.join(missing)}; expected a decoder's config.json with these keys")
    model_type = keys.text("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise NotImplementedError(f"{keys.file}: model_type: got {model_type!r}, expected one of {known}")
    sizes = {ours: keys.whole(theirs) for ours, theirs in _SIZES.items()}
    for ours, theirs in _SIZES.items():
        if sizes[ours] < 1:
            raise keys.error(theirs, sizes[ours], "at least 1")
    bias = keys.flag("attention_bias", model_type == "qwen2")
    try:
        return ModelConfig(
            **sizes,
            num_kv_heads=keys.whole("num_key_value_heads", sizes["num_heads"]),
            head_dim=_head_dim(keys, sizes["embed_dim"], sizes["num_heads"]),
            norm_eps=keys.number("rms_norm_eps", 0.0),
            attn_dropout=keys.number("attention_dropout", 0.0),
            attn_bias=bias,
            attn_output_bias=bool(bias) and model_type == "llama",  # the others have none in Hugging Face's code
            mlp_bias=bool(keys.flag("mlp_bias", False)) and model_type == "llama",
            hidden_act=_ACTIVATION_NAMES.get(keys.text("hidden_act"), keys.text("hidden_act")),
            torch_dtype=_dtype(keys),
            tie_word_embeddings=keys.flag("tie_word_embeddings", None),
            sliding_window=_sliding_window(keys, model_type, sizes["num_layers"], sizes["max_seq_len"]),
            model_type=model_type,
            **_rope(keys),
        )
    except ValueError as error:
        raise error if str(error).startswith(str(keys.file)) else ValueError(f"{keys.file}: {error}") from error


def _head_dim(keys: _Keys, embed_dim: int, num_heads: int) -> int:
    if not keys.has("head_dim") and embed_dim % num_heads:
        got = f"{embed_dim} and {num_heads}"
        raise keys.error("hidden_size, num_attention_heads", got, "a multiple and its divisor, or a head_dim")
    return keys.whole("head_dim", embed_dim // num_heads)


def _dtype(keys: _Keys) -> torch.dtype:
    names = [keys.text(key).removeprefix("torch.") for key in ("dtype", "torch_dtype") if keys.has(key)]
    if len(set(names)) > 1:
        raise keys.error("dtype, torch_dtype", names, "the same")
    if names and names[0] not in _DTYPE_NAMES:
        raise keys.error("dtype", names[0], f"one of {', '.join(_DTYPE_NAMES)}")
    return _DTYPE_NAMES[names[0]] if names else torch.float32


def _sliding_window(keys: _Keys, model_type: str, num_layers: int, max_seq_len: int) -> int | None:
    """None where every token sees all before it; the same window in every layer otherwise."""
    layers = keys.values.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or len(layers) != num_layers):
        raise keys.error("layer_types, num_hidden_layers", layers, f"a list of {num_layers}")
    window = keys.whole("sliding_window") if keys.has("sliding_window") else None
    if model_type == "qwen2" and not keys.flag("use_sliding_window", False):
        window = None
    if window is None or window >= max_seq_len or model_type == "llama":
        return None
    kinds = set(layers or ["sliding_attention"])
    if model_type == "qwen2" and layers is None and keys.whole("max_window_layers", num_layers) > 0:
        kinds.add("full_attention")
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise NotImplementedError(f"{keys.file}: layer_types: got {sorted(kinds)}, expected one kind in all layers")
    return window


def _rope(keys: _Keys) -> dict[str, Any]:
    """The rope_* fields of a ModelConfig, from whichever spelling the file has."""
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        if keys.has(name):
            if not isinstance(keys.values[name], dict):
                raise keys.error(name, keys.values[name], "an object")
            found[name] = _Keys(keys.file, keys.values[name])
    sources = {"rope_theta": keys} | {f"{name}.rope_theta": nested for name, nested in found.items()}
    bases = {name: source.number("rope_theta", 0) for name, source in sources.items() if source.has("rope_theta")}
    if len(set(bases.values())) > 1:
        raise keys.error(", ".join(bases), list(bases.values()), "the same number")
    scalings = [_scaling(nested, name) for name, nested in found.items()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise keys.error(", ".join(found), [nested.values for nested in found.values()], "the same scaling")
    base = float(next(iter(bases.values()), 10_000.0))  # the default of these three in Hugging Face
    return {"rope_base": base, **(scalings[0] if scalings else {})}


def _scaling(keys: _Keys, name: str) -> dict[str, Any]:
    kinds = {keys.text(key) for key in ("rope_type", "type") if keys.has(key)} or {"default"}
    if len(kinds) > 1:
        raise keys.error(f"{name}.rope_type, type", sorted(kinds), "the same")
    kind = kinds.pop()
    if kind == "default":
        return {}
    if kind != "llama3":
        raise NotImplementedError(f"{keys.file}: {name}.rope_type: got {kind!r}, expected 'default' or 'llama3'")
    missing = [f"{name}.{key}" for key in _LLAMA3_KEYS if not keys.has(key)]
    if missing:
        raise ValueError(f"{keys.file}: got no {', '.join(missing)}; expected them with rope_type 'llama3'")
    return {
        "rope_scaling_factor": float(keys.number("factor", 0)),
        "rope_low_freq_factor": float(keys.number("low_freq_factor", 0)),
        "rope_high_freq_factor": float(keys.number("high_freq_factor", 0)),
        "rope_original_max_seq_len": keys.whole("original_max_position_embeddings"),
    }
