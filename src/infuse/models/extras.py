"""Imports what the extra `models` brings, with a message that says how to install what is missing."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any


def import_extra(module: str) -> Any:
    """The module of that dotted name, a part of torchtune, safetensors, tokenizers or transformers.

    Raises ModuleNotFoundError, which says what to install, when its package is not there.
    """
    package = module.partition(".")[0]
    with quiet_imports():
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise  # it is there, something that it needs is not
            message = f"infuse.models: {package} is not installed, expected it for this; pip install 'infuse[models]'"
            raise ModuleNotFoundError(message, name=package) from error
        return importlib.import_module(module)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what importing torchao logs: GPU libraries that a CPU can't load, a call that torch has deprecated."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
