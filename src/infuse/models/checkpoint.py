"""A shard's weights from and to a Hugging Face checkpoint folder: config.json and safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from infuse.models.checkpoint_files import CheckpointFiles
from infuse.models.checkpoint_layout import EMBEDDING, HEAD, Entry, entries, unknown_names
from infuse.models.checkpoint_writing import new_folder, tensors_of, write_index, write_shard
from infuse.models.config import ModelConfig, has_tied_head
from infuse.models.hugging_face_config import load_model_config
from infuse.models.shard import Shard, check_tiling, whole_model
from infuse.models.sharded import ShardedGeneralModel

_FLOATS = ("F64", "F32", "BF16", "F16")
_LISTED = 20  # of each kind of problem, and in one line
_LISTED_BRIEFLY = 3


class CheckpointMismatch(ValueError):
    """A checkpoint that does not fit the model. problems: by kind, such as "missing", those that there are."""

    def __init__(self, folder: str | Path, problems: Mapping[str, list[str]]) -> None:
        self.folder = folder
        self.problems = {kind: items for kind, items in problems.items() if items}
        listing = "".join(f"\n  {kind}:{_listing(items, _LISTED)}" for kind, items in self.problems.items())
        super().__init__(f"{folder}: a checkpoint that does not fit the model.{listing}")

    def one_line(self) -> str:
        """The first few problems of each kind."""
        kinds = [f"{kind}: {_listing(items, _LISTED_BRIEFLY, ', ')[2:]}" for kind, items in self.problems.items()]
        return f"{self.folder}: a checkpoint that does not fit the model: {'; '.join(kinds)}"


def load_sharded_model(
    folder: str | Path,
    shard: Shard | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    use_cache: bool = True,
    max_generated_tokens: int = 1024,
    on_tensor: Callable[[Tensor], None] | None = None,
) -> ShardedGeneralModel:
    """The model of a Hugging Face Llama, Qwen2 or Mistral folder, or one shard of it. See `ShardedGeneralModel`.

    shard: None for all layers. on_tensor: called with each parameter once it is loaded. Raises what `check_checkpoint`
    raises, before there is memory for a weight.
    """
    config = load_model_config(folder)
    shard = shard or whole_model(Path(folder).name, config.num_layers)
    check_checkpoint(folder, shard)
    with _WithoutInitialValues():
        model = ShardedGeneralModel(config, shard, device, dtype, use_cache, max_generated_tokens)
    load_weights(model, folder, on_tensor)
    return model


def check_checkpoint(folder: str | Path, shard: Shard | None = None) -> int:
    """Reads what a folder says about its tensors, and no tensor; returns how many numbers a shard's parameters are.

    shard: None for all layers. Raises what `load_model_config` and `load_weights` raise.
    """
    config = load_model_config(folder)
    shard = shard or whole_model(Path(folder).name, config.num_layers)
    model = ShardedGeneralModel(config, shard, "meta")
    with CheckpointFiles(folder) as files:
        _check(files, entries(model.model, config, shard), config, shard)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def load_weights(
    model: ShardedGeneralModel, folder: str | Path, on_tensor: Callable[[Tensor], None] | None = None
) -> None:
    """Fills a shard from a checkpoint, reading only its own tensors, which take the model's dtype and device.

    on_tensor: called with each parameter once it is filled. Raises CheckpointMismatch (a ValueError), before anything
    is changed, which lists the tensors that are missing, that belong to no layer of the model, that have another shape
    or are not of floating point, the files that are truncated or otherwise broken. Raises ValueError for pickles,
    FileNotFoundError when there is no checkpoint.
    """
    needed = entries(model.model, model.config, model.shard)
    with CheckpointFiles(folder) as files:
        _check(files, needed, model.config, model.shard)
        for entry in needed:
            entry.local.copy_(entry.from_checkpoint(files.read(entry.name, entry.part)))
            if on_tensor is not None:
                on_tensor(entry.local)


def save_checkpoint(models: Sequence[ShardedGeneralModel], folder: str | Path) -> None:
    """Writes config.json and a file for each shard, with an index when there are several; makes the folder.

    Raises ValueError when the shards don't hold every layer once or differ in configuration or dtype; FileExistsError
    when a checkpoint is there already.
    """
    check_tiling([model.shard for model in models])
    if any((model.config, model.dtype) != (models[0].config, models[0].dtype) for model in models):
        raise ValueError("save_checkpoint: got shards of different configurations or dtypes, expected one")
    path = new_folder(folder)
    parts = [
        write_shard(tensors_of(model.model, model.config, model.shard), path, number, len(models))
        for number, model in enumerate(models)
    ]
    write_index(path, models[0].config, models[0].shard.model_id, models[0].dtype, parts)


def _check(files: CheckpointFiles, needed: list[Entry], config: ModelConfig, shard: Shard) -> None:
    problems = _problems(files, needed, config, shard)
    if any(problems.values()):
        raise CheckpointMismatch(files.folder, problems)


def _problems(files: CheckpointFiles, needed: list[Entry], config: ModelConfig, shard: Shard) -> dict[str, list[str]]:
    missing, shapes, dtypes = [], [], []
    for entry in needed:
        spec = files.spec(entry.name) if entry.name in files.files else None
        if spec is None:
            missing.append(entry.name)
            continue
        shape, dtype = spec
        if shape != list(entry.parameter.shape):
            shapes.append(f"{entry.name}: got {shape}, expected {list(entry.parameter.shape)}")
        if dtype not in _FLOATS:
            dtypes.append(f"{entry.name}: got {dtype}, expected one of {', '.join(_FLOATS)}")
    broken = set(files.broken)
    # Of a single file that can't be opened nothing is known; of several, what the index says.
    unreadable = missing if broken and not files.files else []
    return {
        "broken or truncated files": [f"{name}: {error}" for name, error in sorted(files.broken.items())],
        "missing": [name for name in missing if name not in unreadable and files.files.get(name) not in broken],
        "not in this model": unknown_names(set(files.files), needed, config, shard),
        "of another shape": shapes,
        "of another dtype": dtypes,
        "contradictory": [] if shapes or missing else _head_that_is_not_tied(files, config, shard),
    }


def _head_that_is_not_tied(files: CheckpointFiles, config: ModelConfig, shard: Shard) -> list[str]:
    """A tied checkpoint may hold its head as well, as long as it is the embedding."""
    if not (shard.is_last_layer and has_tied_head(config, shard.model_id) and HEAD in files.files):
        return []
    same = files.spec(HEAD) == files.spec(EMBEDDING) and torch.equal(files.read(HEAD), files.read(EMBEDDING))
    return [] if same else [f"{HEAD} differs from {EMBEDDING}, but the configuration ties them"]


def _listing(items: list[str], limit: int, separator: str = "\n    ") -> str:
    shown = [*items[:limit], *([f"and {len(items) - limit} more"] if len(items) > limit else [])]
    return "".join(separator + item for item in shown)


class _WithoutInitialValues(TorchFunctionMode):
    """Modules are made without drawing the numbers that a checkpoint replaces: for 8B parameters minutes of a CPU."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return keywords["tensor"] if "tensor" in keywords else args[0]
        return func(*args, **keywords)
