"""MAHIA-X: an experimental classifier of text and tabular data, and the components that it is made of.

All are plain modules, whose speed comes from compiling them:

    model = HybridEfficientModel(vocab_size=256, text_seq_len=64, tab_dim=32, embed_dim=128)
    model.enable_torch_compile()
    logits = model(tokens, features)
"""

from infuse.models.mahia.attention import MetaAttentionKernel
from infuse.models.mahia.encoders import TabularEncoder, TextEncoder
from infuse.models.mahia.experts import SparseMoETopK
from infuse.models.mahia.fabric import DynamicNeuroFabric
from infuse.models.mahia.fusion import FusionLayer
from infuse.models.mahia.hybrid import HybridEfficientModel
from infuse.models.mahia.hyena import HyenaBlock
from infuse.models.mahia.memory import GraphDiffusionMemory, MemoryState

__all__ = [
    "DynamicNeuroFabric",
    "FusionLayer",
    "GraphDiffusionMemory",
    "HybridEfficientModel",
    "HyenaBlock",
    "MemoryState",
    "MetaAttentionKernel",
    "SparseMoETopK",
    "TabularEncoder",
    "TextEncoder",
]
