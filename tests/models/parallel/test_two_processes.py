"""Decoders over two processes on gloo, which are started once: they equal one process."""

from __future__ import annotations

import json
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
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to; where an earlier one failed, all from there on."""

    def run(folder: Path) -> None:
        for family in {*pipeline.FAMILIES, *tensor_parallel.FAMILIES}:
            save_model(make_model(family), folder / family)
        (folder / "outcome.json").write_text(json.dumps(job.results(2, CHECKS, folder)))

    found: dict[str, str] = json.loads((job.once(tmp_path_factory, "two-processes", run) / "outcome.json").read_text())
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(outcome: dict[str, str], name: str) -> None:
    if outcome[name]:
        pytest.fail(outcome[name], pytrace=False)
