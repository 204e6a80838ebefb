"""What the ids of sources and builds follow, and what importing the package takes."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from infuse import build
from infuse.build import toolchain
from tests.build.fake_nvcc import FakeNvcc, copy_sources


def test_ids_follow_the_sources(nvcc: FakeNvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.source_id(), build.build_id()
    sources = copy_sources(tmp_path, monkeypatch)
    assert (build.source_id(), build.build_id()) == before  # wherever they lie
    (sources / "notes.txt").write_text("no source")
    assert build.source_id() == before[0]
    (sources / "include" / "infuse" / "new.cuh").write_text("// a header")
    assert build.source_id() != before[0]
    assert build.build_id() != before[1]


def test_build_id_follows_architectures_and_compiler(nvcc: FakeNvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {build.build_id(["8.0"]), build.build_id(["9.0a"])}
    monkeypatch.setattr(toolchain, "nvcc_version", lambda nvcc: "14.0.0")
    ids.add(build.build_id(["9.0a"]))
    assert len(ids) == 3
    assert {identifier[:8] for identifier in ids} == {build.source_id()[:8]}


def test_module_is_loaded_by_its_path_without_infuse() -> None:
    """As setup.py does, in an environment where infuse is not installed."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('infuse_build', {build.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules[spec.name] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'infuse', 'torch'} & set(sys.modules)\n"
        "print(module.source_id())\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == build.source_id(), answer.stderr


def test_build_is_a_module_not_hidden_by_a_name() -> None:
    import infuse

    assert isinstance(infuse.build, types.ModuleType)


def test_no_source_tells_gpus_of_one_generation_apart() -> None:
    """sm_86 gets machine code from the PTX of compute_80, where __CUDA_ARCH__ is 800."""
    compared = {
        (path.name, number)
        for path in build.source_files()
        for number in re.findall(r"__CUDA_ARCH__\s*[<>=!]=?\s*(\w+)", path.read_text())
    }
    assert compared  # the expression still finds them
    assert not {(name, number) for name, number in compared if int(number) % 100}
