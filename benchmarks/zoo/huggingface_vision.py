"""Hugging Face's models of images, of sound, and of images or sound with text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.entry import Entry, Inputs, token_ids
from zoo.huggingface import configuration, family, pixels, text

BASE = "AutoModel"
BOTH, EAGER, NONE = ("eager", "sdpa"), ("eager",), ("",)
# name: (configuration class, attention implementations, size of the image, what differs)
_IMAGES: dict[str, tuple[str, tuple[str, ...], int, dict[str, Any]]] = {
    "vit": ("ViTConfig", BOTH, 16, {}),
    "deit": ("DeiTConfig", BOTH, 16, {}),
    "beit": ("BeitConfig", BOTH, 16, {"use_relative_position_bias": True, "out_indices": [1, 2]}),
    "data2vec-vision": ("Data2VecVisionConfig", BOTH, 16, {"use_relative_position_bias": True, "out_indices": [1, 2]}),
    "dinov2": ("Dinov2Config", BOTH, 16, {}),
    "dinov2-swiglu": ("Dinov2Config", ("sdpa",), 16, {"use_swiglu_ffn": True}),
    "dinov3": ("DINOv3ViTConfig", BOTH, 16, {"use_gated_mlp": True, "num_register_tokens": 2}),
    "vit_mae": ("ViTMAEConfig", BOTH, 16, {"decoder_hidden_size": 32, "decoder_num_attention_heads": 2}),
    "yolos": ("YolosConfig", BOTH, 16, {"image_size": [16, 16], "num_detection_tokens": 3}),
    "swin": ("SwinConfig", EAGER, 16, {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2}),
    "swinv2": ("Swinv2Config", EAGER, 16, {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2}),
    "siglip-vision": ("SiglipVisionConfig", BOTH, 16, {}),
    "clip-vision": ("CLIPVisionConfig", BOTH, 16, {}),
    "convnext": ("ConvNextConfig", NONE, 32, {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}),
    "convnextv2": ("ConvNextV2Config", NONE, 32, {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}),
    "segformer": (
        "SegformerConfig",
        NONE,
        32,
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [2, 4]}
        | {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
    ),
    "pvt": (
        "PvtConfig",
        NONE,
        32,
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [2, 4]}
        | {"sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2]}
        | {"image_size": 32},
    ),
    "poolformer": (
        "PoolFormerConfig",
        NONE,
        32,
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3]}
        | {"strides": [4, 2], "padding": [2, 1]},
    ),
    "mobilevit": ("MobileViTConfig", NONE, 64, {"hidden_sizes": [16, 24, 32], "image_size": 64, "patch_size": 2}),
    "hiera": (
        "HieraConfig",
        NONE,
        32,
        {"image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "embed_dim": 16, "depths": [1, 1]}
        | {
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [2, 2],
            "masked_unit_attention": [True, False],
        },
    ),
    "ijepa": ("IJepaConfig", BOTH, 16, {}),
    "vit_msn": ("ViTMSNConfig", BOTH, 16, {}),
    "resnet": ("ResNetConfig", NONE, 32, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "vitdet": ("VitDetConfig", NONE, 16, {"window_block_indices": [0], "window_size": 2}),
    "sam-vision": (
        "SamVisionConfig",
        BOTH,
        16,
        {"output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 96},
    ),
    "pixtral": ("PixtralVisionConfig", BOTH, 16, {}),
    "aimv2": ("Aimv2VisionConfig", BOTH, 16, {}),
}
_TEXT: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "clip-text": ("CLIPTextConfig", BOTH, {}),
    "siglip-text": ("SiglipTextConfig", BOTH, {}),
    "blip-text": ("BlipTextConfig", EAGER, {"encoder_hidden_size": 64, "is_decoder": False}),
}
_SPEECH: dict[str, Any] = {
    "conv_dim": [16, 16],
    "conv_kernel": [4, 3],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "apply_spec_augment": False,
}


def waveform() -> Inputs:
    return (), {"input_values": torch.randn(2, 64)}


def _image_and_text() -> Inputs:
    return (), {"input_ids": token_ids(6), "pixel_values": torch.randn(2, 3, 16, 16)}


def _two_towers(config_class: str, text_class: str, vision_class: str) -> dict[str, Any]:
    return {
        "text_config": lambda: configuration(text_class).to_dict(),
        "vision_config": lambda: configuration(vision_class).to_dict(),
        "projection_dim": 16,
    }


def entries() -> Iterator[Entry]:
    for name, (config, attentions, size, changes) in _IMAGES.items():
        yield from family(name, config, BASE, pixels(size), attentions, **changes)
    for name, (config, attentions, changes) in _TEXT.items():
        model = {"blip-text": "BlipTextModel", "siglip-text": "SiglipTextModel"}.get(name, BASE)
        yield from family(name, config, model, text(), attentions, **changes)
    for name in ("CLIP", "Siglip", "Blip"):
        towers = _two_towers(f"{name}Config", f"{name}TextConfig", f"{name}VisionConfig")
        yield from family(
            name.lower(), f"{name}Config", BASE, _image_and_text, EAGER if name == "Blip" else BOTH, **towers
        )
    for name, config in (("wav2vec2", "Wav2Vec2Config"), ("hubert", "HubertConfig"), ("wavlm", "WavLMConfig")):
        attentions = EAGER if name == "wavlm" else BOTH
        yield from family(name, config, BASE, waveform, attentions, **_SPEECH)
    yield from family("detr", "DetrConfig", BASE, pixels(32), EAGER, **_detection())
    yield from family("table-transformer", "TableTransformerConfig", BASE, pixels(32), EAGER, **_detection())
    yield from family("audio-spectrogram", "ASTConfig", BASE, _spectrogram, num_mel_bins=16, max_length=16)
    yield from family("perceiver", "PerceiverConfig", BASE, _latents, ("",), **_PERCEIVER)
    yield from family(
        "decision-transformer", "DecisionTransformerConfig", BASE, _trajectory, ("",), state_dim=4, act_dim=2
    )
    yield from family("time-series", "PatchTSTConfig", BASE, _series, ("eager",), **_SERIES)
    yield from family("videomae", "VideoMAEConfig", BASE, _video, num_frames=4)


_PERCEIVER: dict[str, Any] = {"num_latents": 6, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 2}
_PERCEIVER |= {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "d_model": 64}
_SERIES: dict[str, Any] = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4}


def _detection() -> dict[str, Any]:
    return {
        "backbone_config": lambda: configuration(
            "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
        ),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "num_queries": 5,
    }


def _spectrogram() -> Inputs:
    return (), {"input_values": torch.randn(2, 16, 16)}


def _latents() -> Inputs:
    return (), {"inputs": torch.randn(2, 10, 64)}


def _trajectory() -> Inputs:
    return (), {
        "states": torch.randn(2, 3, 4),
        "actions": torch.randn(2, 3, 2),
        "rewards": torch.randn(2, 3, 1),
        "returns_to_go": torch.randn(2, 3, 1),
        "timesteps": torch.arange(3).expand(2, 3).contiguous(),
        "attention_mask": torch.ones(2, 3),
    }


def _series() -> Inputs:
    return (), {"past_values": torch.randn(2, 16, 2)}


def _video() -> Inputs:
    return (), {"pixel_values": torch.randn(2, 4, 3, 16, 16)}
