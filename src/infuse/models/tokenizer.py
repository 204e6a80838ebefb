"""tokenizer.json of a checkpoint folder, the tokens that end a text, and text from tokens as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infuse.models.extras import import_extra

FILE = "tokenizer.json"


def load_tokenizer(folder: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder: `encode(text).ids`, `decode(ids)`.

    Raises FileNotFoundError without tokenizer.json; ValueError when it can't be read; ModuleNotFoundError when
    tokenizers (extra `models`) is not installed.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"load_tokenizer: got {folder}, expected a folder with {FILE}")
    try:
        return import_extra("tokenizers").Tokenizer.from_file(str(path))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"load_tokenizer: got {path}, expected a tokenizer: {error}") from error


def load_stop_tokens(folder: str | Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, or else of config.json; none when neither has it.

    Raises ValueError when a file is no JSON object or eos_token_id is not one or several whole numbers.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            keys = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"load_stop_tokens: got {path}, expected JSON: {error}") from error
        found = keys.get("eos_token_id") if isinstance(keys, dict) else "no object"
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ValueError(f"{path}: eos_token_id: got {found!r}, expected a whole number or a list of them")
        return tuple(ids)
    return ()


class TextStream:
    """Tokens in, pieces of text out: a character whose bytes span several tokens comes whole, with the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = import_extra("tokenizers.decoders").DecodeStream(skip_special_tokens=True)
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What this token completes; "" while a character is unfinished."""
        piece = self._stream.step(self._tokenizer, token)
        self._waiting = [] if piece is not None else [*self._waiting, token]
        return piece or ""

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD; "" when there is nothing."""
        rest: str = self._tokenizer.decode(self._waiting, skip_special_tokens=True) if self._waiting else ""
        self._waiting = []
        return rest
