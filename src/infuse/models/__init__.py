"""Reference models: the decoders that the demo and the tests share, and sharded decoders of Hugging Face checkpoints.

They are written plainly, on torchtune; compiling them with backend="infuse" makes them fast. What needs an optional
package is imported when its name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infuse.models.checkpoint import load_sharded_model, load_weights, save_checkpoint
    from infuse.models.config import ModelConfig
    from infuse.models.decoder import GeneralMHA, ShardTransformerDecoder
    from infuse.models.hugging_face_config import load_model_config
    from infuse.models.masks import attention_mask, pad_left, positions
    from infuse.models.sampling import Sampling
    from infuse.models.shard import Shard, split_layers
    from infuse.models.sharded import ShardChain, ShardedGeneralModel
    from infuse.models.tokenizer import load_stop_tokens, load_tokenizer
    from infuse.models.writing import stream_text, stream_tokens

_MODULES = {
    "load_sharded_model": "checkpoint",
    "load_weights": "checkpoint",
    "save_checkpoint": "checkpoint",
    "ModelConfig": "config",
    "GeneralMHA": "decoder",
    "ShardTransformerDecoder": "decoder",
    "load_model_config": "hugging_face_config",
    "attention_mask": "masks",
    "pad_left": "masks",
    "positions": "masks",
    "Sampling": "sampling",
    "Shard": "shard",
    "split_layers": "shard",
    "ShardChain": "sharded",
    "ShardedGeneralModel": "sharded",
    "load_stop_tokens": "tokenizer",
    "load_tokenizer": "tokenizer",
    "stream_text": "writing",
    "stream_tokens": "writing",
}

__all__ = [
    "GeneralMHA",
    "ModelConfig",
    "Sampling",
    "Shard",
    "ShardChain",
    "ShardTransformerDecoder",
    "ShardedGeneralModel",
    "attention_mask",
    "load_model_config",
    "load_sharded_model",
    "load_stop_tokens",
    "load_tokenizer",
    "load_weights",
    "pad_left",
    "positions",
    "save_checkpoint",
    "split_layers",
    "stream_text",
    "stream_tokens",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
