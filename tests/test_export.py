"""torch.export and AOTInductor: the same rewrite over the graphs they make."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import infuse
from infuse import backend
from infuse.report import SiteRecord
from infuse.settings import Settings
from tests.small_models import SITES, Block
from tests.tolerances import assert_close_to_fp64


def exported(block: Block) -> torch.export.ExportedProgram:
    x = torch.randn(2, 6, 32, dtype=next(block.parameters()).dtype)
    with torch.no_grad():
        return torch.export.export(block, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))


def rewrite(program: torch.export.ExportedProgram) -> dict[str, int]:
    records: list[SiteRecord] = []
    stop = backend.on_rewrite(records.extend)
    with torch.no_grad():
        backend.InfusePass(Settings(), max_autotune=False)(program.graph_module.graph)
    stop()
    program.graph_module.recompile()
    return dict(Counter(record.kind for record in records if record.status == "rewritten"))


@torch.no_grad()
def check(function: torch.nn.Module, block: Block, length: int) -> None:
    x = torch.randn(2, length, 32, dtype=next(block.parameters()).dtype)
    reference = Block().double()
    reference.load_state_dict(block.state_dict())
    assert_close_to_fp64(function(x), block(x), reference(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_program_survives_the_rewrite_saving_and_loading(dtype: torch.dtype, tmp_path: Path) -> None:
    block = Block().to(dtype).eval()
    program = exported(block)
    assert rewrite(program) == SITES
    check(program.module(), block, 9)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2")
    check(loaded.module(), block, 7)
    assert sum("infuse" in str(node.target) for node in loaded.graph.nodes) == sum(SITES.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_aot_inductor_package_is_rewritten_and_right(dtype: torch.dtype, tmp_path: Path) -> None:
    block = Block().to(dtype).eval()
    records: list[SiteRecord] = []
    stop = backend.on_rewrite(records.extend)
    package = torch._inductor.aoti_compile_and_package(
        exported(block), package_path=str(tmp_path / "block.pt2"), inductor_configs=infuse.options()
    )
    stop()
    assert Counter(record.kind for record in records if record.status == "rewritten") == SITES
    check(torch._inductor.aoti_load_package(package), block, 11)
