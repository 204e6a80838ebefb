"""Library files that must not be loaded, and which of the good ones is found."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from infuse import build
from infuse.build import library_file, toolchain
from tests.build.fake_nvcc import FakeNvcc, copy_sources, only_warning


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def replace_by_text(path: Path) -> None:
    path.write_text("<html>404</html>")


def replace_by_foreign(path: Path) -> None:
    path.write_bytes(b"\x7fELF another project's library")
    library_file.seal(path)


def replace_by_other_architectures(path: Path) -> None:
    shutil.copy(build.build(["8.0"]), path)


DAMAGE = {
    truncate: "truncated or altered",
    alter: "truncated or altered",
    replace_by_text: "expected an ELF shared library",
    replace_by_foreign: "without infuse_build_id",
    replace_by_other_architectures: "got build .*, expected build ",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items(), ids=[function.__name__ for function in DAMAGE])
def test_unusable_library_is_reported_once_and_replaced(
    damage: Callable[[Path], None], message: str, nvcc: FakeNvcc, cache: Path, quick_check: None
) -> None:
    path = build.build(["9.0a"])
    damage(path)
    for other in cache.iterdir():
        if other != path.parent:
            shutil.rmtree(other)
    found, warning = only_warning(build.find_library)
    assert found is None
    assert re.search(rf"{re.escape(str(path))}.*got .*expected", warning) and re.search(message, warning)
    assert not path.exists()
    assert "\n" not in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.find_library() is None
        assert build.build(["9.0a"]) == path
        assert build.find_library() == path


def test_build_replaces_an_unusable_library(nvcc: FakeNvcc, cache: Path, quick_check: None) -> None:
    path = build.build(["9.0a"])
    truncate(path)
    rebuilt, warning = only_warning(lambda: build.build(["9.0a"]))
    assert rebuilt == path and "truncated" in warning
    assert build.find_library() == path


def test_libraries_of_other_sources_are_left_alone(
    nvcc: FakeNvcc, cache: Path, quick_check: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build.build(["9.0a"])
    (copy_sources(tmp_path, monkeypatch) / "new.h").write_text("// newer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.find_library() is None
    assert old.is_file()


def test_library_is_found_when_nvcc_is_gone(
    nvcc: FakeNvcc, cache: Path, quick_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build(["9.0a"])
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    assert build.find_library() == path


def test_packaged_library_is_preferred_and_must_match_the_sources(
    nvcc: FakeNvcc, cache: Path, quick_check: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = build.build(["9.0a"], directory=tmp_path / "_lib")
    cached = build.build(["9.0a"])
    monkeypatch.setattr(library_file, "packaged_library", lambda: packaged)
    assert build.find_library() == packaged
    cached.unlink()
    (copy_sources(tmp_path, monkeypatch) / "new.h").write_text("// newer")
    found, warning = only_warning(build.find_library)
    assert found is None
    assert re.search(r"_lib.*got one of sources \w+, expected sources \w+", warning)
    assert packaged.is_file()
