"""The small real checkpoint that the tests of `infuse generate` share, made once for all test processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a Llama with 3 layers, trained on Python's sources. Not to be written to."""
    pytest.importorskip("torchtune")
    pytest.importorskip("transformers")
    from tests.models.trained import save_trained

    common = tmp_path_factory.getbasetemp()
    common = common.parent if common.name.startswith("popen-") else common  # a folder for each of xdist's processes
    folder = common / "trained-llama"
    with FileLock(common / "trained-llama.lock"):
        if not (folder / "tokenizer.json").is_file():
            save_trained(folder)
    return folder
