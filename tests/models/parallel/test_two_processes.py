"""Decoders over two processes on gloo, which are started once: they equal one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("torchtune")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tests.models.hugging_face import make_model, save_model
from tests.models.parallel import job

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
MODULE = "tests.models.parallel.two_processes"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, str]]:
    @functools.cache
    def run() -> dict[str, str]:
        folder: Path = tmp_path_factory.mktemp("job")
        for family in ("llama", "qwen2_tied"):
            save_model(make_model(family), folder / family)
        return job.results(2, MODULE, folder)

    return run


@pytest.mark.parametrize("name", job.checks(MODULE))
def test_two_processes(outcome: Callable[[], dict[str, str]], name: str) -> None:
    assert outcome()[name] == ""
