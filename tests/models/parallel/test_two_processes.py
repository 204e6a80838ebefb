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
from tests.models.parallel import job, pipeline, tensor_parallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
CHECKS = [name for module in ("pipeline", "tensor_parallel", "training", "saving") for name in job.checks(module)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, str]]:
    @functools.cache
    def run() -> dict[str, str]:
        folder: Path = tmp_path_factory.mktemp("job")
        for family in {*pipeline.FAMILIES, *tensor_parallel.FAMILIES}:
            save_model(make_model(family), folder / family)
        return job.results(2, CHECKS, folder)

    return run


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(outcome: Callable[[], dict[str, str]], name: str) -> None:
    failure = outcome()[name]
    if failure:
        pytest.fail(failure, pytrace=False)
