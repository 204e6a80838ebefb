"""The type checker must be able to fail: without its tree of links mypy passes whatever is in the packages."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed (pip install 'infuse[dev]')")

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("typecheck", ROOT / ".ci" / "typecheck.py")
assert SPEC is not None and SPEC.loader is not None
typecheck = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(typecheck)

# Wrong only for a checker that follows the import from one top-level folder into another.
PLANTED = """from infuse.settings import Settings

numerics: int = Settings().numerics
"""
FOLDERS = ("ops", "patterns", "lowering", "lowering/heuristics", "build", "models", "cli")


def test_mypy_finds_an_error_planted_in_each_package(tmp_path: Path) -> None:
    farm = tmp_path / "farm"
    shutil.copytree(typecheck.make_link_farm(tmp_path / "links"), farm, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("", *FOLDERS):
        (farm / "infuse" / folder / "planted.py").write_text(PLANTED)
    # torch's own sources are left out: reading them takes most of a full run, and `make typecheck` does it.
    result = typecheck.run_mypy(farm, "--follow-imports=skip", f"--cache-dir={tmp_path / 'cache'}", capture=True)
    assert result.returncode == 1, result.stdout + result.stderr
    for folder in ("", *FOLDERS):
        path = (Path("infuse") / folder / "planted.py").as_posix()
        assert f"{path}:3: error: Incompatible types in assignment" in result.stdout, f"{path}\n{result.stdout}"


def test_link_farm_follows_the_tree(tmp_path: Path) -> None:
    for folder in ("src/infuse/cli", "ops", "patterns", "lowering", "csrc"):
        (tmp_path / folder).mkdir(parents=True)
    old = tmp_path / "src" / "infuse" / "old.py"
    old.touch()
    farm = tmp_path / "farm"
    typecheck.make_link_farm(farm, tmp_path)
    names = sorted(link.name for link in (farm / "infuse").iterdir())
    assert names == ["cli", "csrc", "lowering", "old.py", "ops", "patterns"]
    old.rename(old.with_name("new.py"))
    typecheck.make_link_farm(farm, tmp_path)
    assert (farm / "infuse" / "new.py").exists()
    assert not (farm / "infuse" / "old.py").is_symlink()
