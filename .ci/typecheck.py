"""Run mypy over the package as it is installed: infuse, infuse.ops, infuse.patterns and the rest, in one tree.

The packages lie in several top-level folders and mypy doesn't follow an editable install's import hook: it would take
them for untyped third-party modules and pass. So it gets a tree of links, build/typecheck/infuse, as its search path.
tests/test_typecheck.py plants errors in a copy of that tree to prove that they are found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FARM = ROOT / "build" / "typecheck"
MAPPED = ("ops", "patterns", "lowering", "csrc")


def make_link_farm(farm: Path, root: Path = ROOT) -> Path:
    """Bring the tree of links `farm`/infuse up to date and return `farm`; as PYTHONPATH it serves for an install."""
    package = farm / "infuse"
    package.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in (root / "src" / "infuse").iterdir() if entry.name != "__pycache__"]
    wanted = {entry.name: entry for entry in [*entries, *(root / name for name in MAPPED)]}
    for link in package.iterdir():
        if wanted.get(link.name) != link.readlink():
            link.unlink()
    for name, target in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(target, target_is_directory=target.is_dir())
    return farm


def run_mypy(farm: Path, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """mypy with the project's settings on the package `infuse` in `farm`."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "infuse", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(farm)}, check=False, text=True, capture_output=capture
    )


if __name__ == "__main__":
    raise SystemExit(run_mypy(make_link_farm(FARM), *sys.argv[1:]).returncode)
