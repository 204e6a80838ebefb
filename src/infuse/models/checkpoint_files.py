"""The safetensors files of a checkpoint folder, as one set of tensors by name. Pickles are never opened."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from infuse.models.extras import import_extra

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointFiles:
    """Opens, as a context, what a folder's index or its single file names; a file is opened when a tensor needs it.

    `files` is which file holds which tensor, as the index (or the single file itself) says. `broken` collects what is
    wrong with files that could not be opened.
    Raises FileNotFoundError when the folder has no safetensors, ValueError when it has pickles instead or an index that
    can't be read; ModuleNotFoundError when safetensors (extra `models`) is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.broken: dict[str, str] = {}
        self._safetensors = import_extra("safetensors")
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self.files = self._find()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def spec(self, name: str) -> tuple[list[int], str] | None:
        """Shape and safetensors' dtype (such as "BF16") of a tensor; None when its file does not hold it."""
        file = self._file(self.files[name])
        if file is None or name not in file.keys():  # noqa: SIM118  (no mapping)
            return None
        part = file.get_slice(name)
        return part.get_shape(), part.get_dtype()

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, on the CPU, or a part of it, which is all that is read then. `spec` has found it before."""
        file = self._open[self.files[name]]
        tensor: Tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
        return tensor

    def _find(self) -> dict[str, str]:
        if (self.folder / SINGLE).is_file():
            single = self._file(SINGLE)
            return dict.fromkeys(single.keys(), SINGLE) if single is not None else {}
        if (self.folder / INDEX).is_file():
            return _read_index(self.folder / INDEX)
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if pickles:
            remedy = "a pickle runs code when it is opened and is refused; convert those that you trust"
            raise ValueError(f"{self.folder}: got {', '.join(pickles)}, expected {SINGLE} or {INDEX}; {remedy}")
        raise FileNotFoundError(f"{self.folder}: got no checkpoint, expected {SINGLE} or {INDEX} in this folder")

    def _file(self, file_name: str) -> Any:
        """The opened file; None when it is broken."""
        if file_name not in self._open and file_name not in self.broken:
            try:
                handle = self._safetensors.safe_open(self.folder / file_name, framework="pt", device="cpu")
                self._open[file_name] = self._stack.enter_context(handle)
            except (OSError, self._safetensors.SafetensorError) as error:
                self.broken[file_name] = str(error)
        return self._open.get(file_name)


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(name, str) and isinstance(file, str) for name, file in files.items()):
            raise TypeError("a file's name that is no string")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        expected = "expected a JSON object with weight_map, tensor names to file names"
        raise ValueError(f"{path}: {expected}: {error!r}") from error
    wrong = sorted({file for file in files.values() if Path(file).name != file or not file.endswith(".safetensors")})
    if wrong:
        raise ValueError(f"{path}: got {', '.join(wrong)}, expected names of *.safetensors files in the same folder")
    return dict(files)
