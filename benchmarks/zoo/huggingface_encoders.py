"""Hugging Face's text encoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.entry import Entry, token_ids
from zoo.huggingface import family, padded_text, text

BASE = "AutoModel"
BOTH, EAGER = ("eager", "sdpa"), ("eager",)
# name: (configuration class, attention implementations, what differs)
_ENCODERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "bert": ("BertConfig", BOTH, {}),
    "roberta": ("RobertaConfig", BOTH, {}),
    "xlm-roberta": ("XLMRobertaConfig", BOTH, {}),
    "albert": ("AlbertConfig", BOTH, {"embedding_size": 32}),
    "electra": ("ElectraConfig", BOTH, {"embedding_size": 32}),
    "distilbert": ("DistilBertConfig", BOTH, {}),
    "camembert": ("CamembertConfig", BOTH, {}),
    "mpnet": ("MPNetConfig", EAGER, {}),
    "deberta": ("DebertaConfig", EAGER, {"pos_att_type": ["c2p", "p2c"], "relative_attention": True}),
    "deberta-v2": ("DebertaV2Config", EAGER, {"pos_att_type": ["c2p", "p2c"], "relative_attention": True}),
    "modernbert": ("ModernBertConfig", BOTH, {"local_attention": 4, "classifier_pooling": "mean"}),
    "rembert": ("RemBertConfig", EAGER, {"input_embedding_size": 32, "output_embedding_size": 32}),
    "convbert": ("ConvBertConfig", EAGER, {"embedding_size": 32, "head_ratio": 2, "num_groups": 1}),
    "squeezebert": ("SqueezeBertConfig", EAGER, {"embedding_size": 64}),
    "mobilebert": ("MobileBertConfig", EAGER, {"embedding_size": 32, "intra_bottleneck_size": 32}),
    "ernie": ("ErnieConfig", BOTH, {}),
    "esm": ("EsmConfig", BOTH, {"position_embedding_type": "rotary", "mask_token_id": 3}),
    "roformer": ("RoFormerConfig", EAGER, {"embedding_size": 64}),
    "xlnet": ("XLNetConfig", EAGER, {"d_inner": 96}),
    "fnet": ("FNetConfig", ("",), {}),
    "megatron-bert": ("MegatronBertConfig", EAGER, {}),
    "ibert": ("IBertConfig", EAGER, {}),
    "nomic_bert": ("NomicBertConfig", BOTH, {}),
    "eurobert": ("EuroBertConfig", BOTH, {}),
    "roberta-prelayernorm": ("RobertaPreLayerNormConfig", BOTH, {}),
    "xmod": ("XmodConfig", EAGER, {"languages": ["en_XX"], "default_language": "en_XX"}),
    "layoutlm": ("LayoutLMConfig", EAGER, {}),
    "longformer": ("LongformerConfig", EAGER, {"attention_window": 4}),
    "big_bird": ("BigBirdConfig", EAGER, {"attention_type": "original_full", "block_size": 2}),
}
_PAIRS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "t5": ("T5Config", EAGER, {}),
    "t5-gated": ("T5Config", EAGER, {"feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5Config", EAGER, {}),
    "umt5": ("UMT5Config", EAGER, {}),
    "longt5": ("LongT5Config", EAGER, {"local_radius": 3}),
    "switch": (
        "SwitchTransformersConfig",
        EAGER,
        {"num_experts": 2, "expert_capacity": 16, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1}
        | {"num_sparse_decoder_layers": 1},
    ),
    "bart": ("BartConfig", BOTH, {"forced_eos_token_id": None}),
    "mbart": ("MBartConfig", BOTH, {"forced_eos_token_id": None}),
    "pegasus": ("PegasusConfig", BOTH, {"forced_eos_token_id": None}),
    "marian": ("MarianConfig", BOTH, {"forced_eos_token_id": None, "decoder_vocab_size": 128}),
    "m2m_100": ("M2M100Config", BOTH, {}),
    "blenderbot": ("BlenderbotConfig", BOTH, {"forced_eos_token_id": None}),
    "plbart": ("PLBartConfig", BOTH, {"forced_eos_token_id": None}),
    "led": ("LEDConfig", EAGER, {"attention_window": 4, "max_encoder_position_embeddings": 64}),
    "prophetnet": ("ProphetNetConfig", EAGER, {"num_encoder_layers": 2, "num_decoder_layers": 2}),
    "bigbird_pegasus": ("BigBirdPegasusConfig", EAGER, {"attention_type": "original_full", "block_size": 2}),
}


def decoder_ids() -> Tensor:
    return token_ids(5)


def entries() -> Iterator[Entry]:
    for name, (config, attentions, changes) in _ENCODERS.items():
        yield from family(name, config, BASE, text(), attentions, **changes)
    for name in ("bert", "modernbert", "distilbert"):
        config, attentions, changes = _ENCODERS[name]
        yield from family(f"{name}-padded", config, BASE, padded_text(), attentions, **changes)
    for name, (config, attentions, changes) in _PAIRS.items():
        discrete = name == "switch"
        inputs = text(decoder_input_ids=decoder_ids)
        yield from family(name, config, BASE, inputs, attentions, discrete=discrete, **changes)
    yield from family("bert-dropout", "BertConfig", BASE, text(), random=True, attention_probs_dropout_prob=0.1)
    features = {"input_features": lambda: torch.randn(2, 8, 16)}
    yield from family(
        "whisper",
        "WhisperConfig",
        BASE,
        lambda: ((), {"input_features": features["input_features"](), "decoder_input_ids": token_ids(5)}),
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
    )
