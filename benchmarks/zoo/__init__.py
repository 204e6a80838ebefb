"""Small models with random weights, as their authors wrote them, one file a source."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterator

from zoo.entry import Entry

FILES = (
    "torchtune_models",
    "huggingface_decoders",
    "huggingface_encoders",
    "huggingface_vision",
    "attention_spellings",
    "attention_heads",
    "attention_layouts",
    "attention_of_torch",
    "norm_spellings",
    "gate_spellings",
    "rope_spellings",
    "blocks",
    "published_language",
    "published_other_fields",
    "caches_and_own",
    "image_models",
    "image_generators",
    "language_models",
    "language_encoders",
    "language_caches",
    "speech_and_science",
    "sequence_mixers",
    "unusual_norms",
    "unusual_gates",
    "unusual_rotations",
    "unusual_scores",
)


def entries(files: str = "*") -> Iterator[Entry]:
    """The models of the files whose name matches a glob, all by default."""
    for file in FILES:
        if fnmatch.fnmatch(file, files):
            yield from importlib.import_module(f"zoo.{file}").entries()
