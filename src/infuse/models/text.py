"""Python sources as bytes: a text that every machine has, with one token a byte.

Four leading spaces become one tab, so that a model spends its context on words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infuse.models.extras import import_extra

VOCAB_SIZE = 256
# Installed packages, tests, and modules that are tables rather than code.
EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
)
VALIDATION_EVERY = 10
_INDENT = re.compile(rb"^(?: {4})+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Text:
    """train, validation: uint8 [bytes], from different files. digest: 12 hex digits that name the text."""

    train: Tensor
    validation: Tensor
    num_files: int
    digest: str


def read_sources(folder: Path) -> Text:
    """The *.py files under a folder, in the order of their paths; every tenth is for validation.

    Raises ValueError when there are fewer than two such files.
    """
    paths = [path for path in folder.rglob("*.py") if EXCLUDED.isdisjoint(path.relative_to(folder).parts[:-1])]
    paths.sort(key=lambda path: path.relative_to(folder).as_posix())
    if len(paths) < 2:
        raise ValueError(f"text: got {len(paths)} *.py files in {folder}, expected at least 2")
    parts = [_INDENT.sub(_tabs, path.read_bytes()) for path in paths]
    validation = b"".join(parts[::VALIDATION_EVERY])
    train = b"".join(part for index, part in enumerate(parts) if index % VALIDATION_EVERY)
    digest = hashlib.sha256(train + validation).hexdigest()[:12]
    return Text(_tensor(train), _tensor(validation), len(paths), digest)


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` with a token a byte, numbered as `Text` has them; decoding gives spaces for tabs.

    Raises ModuleNotFoundError when tokenizers (extra `models`) is not installed.
    """
    tokenizers = import_extra("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(_byte_letters(), merges=[]))
    # From the beginning of a line, or from where the last indentation ended.
    tokenizer.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(r"(?:^|\G) {4}"), "\t")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\t", "    ")])
    return tokenizer


def _byte_letters() -> dict[str, int]:
    """The letter that is each byte in byte-level tokenizers: its own if it can be seen, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(VOCAB_SIZE) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(VOCAB_SIZE + index): byte for index, byte in enumerate(others)}


def batches(data: Tensor, *, batch_size: int, seq_len: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of `data` (uint8 [N]): tokens and the tokens after them, int64 [batch_size, seq_len] each.

    The same arguments give the same batches. Raises ValueError when the data is shorter than a window.
    """
    windows = data.numel() - seq_len
    if windows < 1:
        raise ValueError(f"batches: got {data.numel()} bytes of text, expected more than seq_len={seq_len}")
    return _batches(data, windows, batch_size, seq_len, torch.Generator().manual_seed(seed))


def _batches(
    data: Tensor, windows: int, batch_size: int, seq_len: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    offsets = torch.arange(seq_len + 1)
    while True:
        # Drawn on the CPU, so that every device gets the same batches.
        starts = torch.randint(windows, (batch_size, 1), generator=generator)
        window = data[(starts + offsets).to(data.device)].long()
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


def _tabs(indent: re.Match[bytes]) -> bytes:
    return b"\t" * (len(indent[0]) // 4)


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
