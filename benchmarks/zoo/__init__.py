"""Small models with random weights, as their authors wrote them, one file a source."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from zoo.entry import Entry

FILES = (
    "torchtune_models",
    "huggingface_decoders",
)


def entries() -> Iterator[Entry]:
    """All models of the zoo. A file whose library is missing raises ModuleNotFoundError when it is reached."""
    for file in FILES:
        yield from importlib.import_module(f"zoo.{file}").entries()
