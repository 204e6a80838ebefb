"""Fixtures of the tests of infuse.build: an empty cache, a compiler that is a stand-in, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from infuse import build
from infuse.build import compilation, library_file, loading, toolchain
from tests.build.fake_nvcc import C_COMPILER, FakeNvcc


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no settings in the environment, and a module that has not loaded or reported anything."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(folder))
    for variable in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(library_file, "packaged_library", lambda: tmp_path / "no such package" / build.LIBRARY_NAME)
    monkeypatch.setattr(library_file, "_reported", set())
    monkeypatch.setattr(loading, "_loaded", None)
    monkeypatch.setattr(loading, "_failures", {})
    return folder


@pytest.fixture
def nvcc(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvcc:
    if C_COMPILER is None:
        pytest.skip("the stand-in for nvcc needs a C compiler")
    fake = FakeNvcc(tmp_path / "fake nvcc")
    monkeypatch.setenv("CUDACXX", str(fake.path))
    return fake


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the trial load in a new process, which imports torch: seconds."""
    monkeypatch.setattr(compilation, "_check_loads", lambda library, identifier: None)


@pytest.fixture
def no_nvcc(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "USUAL_NVCC", tmp_path / "usual" / "nvcc")
