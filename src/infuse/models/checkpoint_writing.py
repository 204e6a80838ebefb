"""The files of a Hugging Face checkpoint folder, one for each shard, written by whoever holds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from infuse.models.checkpoint_files import INDEX, SINGLE
from infuse.models.checkpoint_layout import EMBEDDING, entries
from infuse.models.config import ModelConfig
from infuse.models.extras import import_extra
from infuse.models.hugging_face_config import FILE, hugging_face_config
from infuse.models.shard import Shard


@dataclass(frozen=True, slots=True)
class Written:
    """One file of a checkpoint, and the tensors in it."""

    file: str
    tensors: tuple[str, ...]
    num_bytes: int


def new_folder(folder: str | Path) -> Path:
    """Makes a folder to save in. Raises FileExistsError when a checkpoint is there already."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    there = sorted(file.name for file in path.iterdir() if ".safetensors" in file.name)
    if there:
        raise FileExistsError(f"save_checkpoint: got {folder} with {', '.join(there)}, expected no checkpoint in it")
    return path


def tensors_of(decoder: nn.Module, config: ModelConfig, shard: Shard) -> dict[str, Tensor]:
    """What a shard writes, on the CPU, by the names of the checkpoint. A tied head is the first shard's embedding.

    Every rank that holds a part of a cut parameter must call it; each gets the whole.
    """
    return {
        entry.name: entry.to_checkpoint()
        for entry in entries(decoder, config, shard)
        if entry.name != EMBEDDING or shard.is_first_layer
    }


def write_shard(tensors: dict[str, Tensor], path: Path, number: int, count: int) -> Written:
    """The file of shard `number` (from 0) of `count`."""
    name = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    import_extra("safetensors.torch").save_file(tensors, path / name, metadata={"format": "pt"})
    return Written(name, tuple(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def write_index(path: Path, config: ModelConfig, model_id: str, dtype: torch.dtype, parts: Sequence[Written]) -> None:
    """config.json, and the index of several files; last, since with it the folder is a checkpoint."""
    if len(parts) > 1:
        files = {tensor: part.file for part in parts for tensor in part.tensors}
        size = sum(part.num_bytes for part in parts)
        _write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
    keys = hugging_face_config(config, model_id) | {"dtype": str(dtype).removeprefix("torch.")}
    _write_json(path / FILE, keys)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
