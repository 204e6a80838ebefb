"""What a user installs: the wheel and the sdist hold every package and every CUDA source, and the metadata is right."""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools", reason="setuptools is not installed (pip install 'infuse[test]')")
# Not "build": without the package that would be the folder of that name in the checkout.
pytest.importorskip("build.env", reason="build is not installed (pip install 'infuse[test]')")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "ops", "patterns", "lowering", "csrc", "tests", "benchmarks", "examples", ".ci")
LEFT_OUT = shutil.ignore_patterns("results", "_lib", "*.egg-info", "__pycache__")
CUDA_SOURCES = (".cu", ".cuh", ".cpp", ".h")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_dir(package: str) -> Path:
    """Where a package lies in the checkout, by the nearest entry of package-dir."""
    mapping = project()["tool"]["setuptools"]["package-dir"]
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in mapping:
            return ROOT.joinpath(mapping[prefix], *parts[length:])
    raise AssertionError(f"{package}: no entry in package-dir")


def csrc_files() -> set[str]:
    return {
        path.relative_to(ROOT / "csrc").as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and path.suffix in CUDA_SOURCES
    }


def copy_of_the_tree(destination: Path) -> Path:
    """The project without what was built or installed in it, so that a build leaves nothing in the checkout."""
    destination.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, destination)
        elif path.name in FOLDERS:
            shutil.copytree(path, destination / path.name, ignore=LEFT_OUT)
    return destination


@dataclass(frozen=True, slots=True)
class Built:
    wheel: Path
    wheel_files: frozenset[str]
    sdist_files: frozenset[str]
    metadata: email.message.Message
    entry_points: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of a copy of the tree, and a wheel without kernels that was made from that sdist."""
    source = copy_of_the_tree(tmp_path_factory.mktemp("source") / "tree")
    out = tmp_path_factory.mktemp("dist")
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        env={**os.environ, "INFUSE_BUILD_KERNELS": "0"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = frozenset(archive.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = email.parser.Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    with tarfile.open(sdist) as archive:
        sdist_files = frozenset(name.partition("/")[2] for name in archive.getnames())
    return Built(wheel, names, sdist_files, metadata, entry_points)


def test_package_list_is_what_lies_on_disk() -> None:
    on_disk = {"infuse.csrc"}  # data only, so it has no __init__.py
    for top in ("infuse", "infuse.ops", "infuse.patterns", "infuse.lowering"):
        folder = package_dir(top)
        for init in folder.rglob("__init__.py"):
            on_disk.add(".".join([top, *init.parent.relative_to(folder).parts]))
    assert set(project()["tool"]["setuptools"]["packages"]) == on_disk


def test_wheel_holds_every_module(built: Built) -> None:
    for package in project()["tool"]["setuptools"]["packages"]:
        expected = {f"{package.replace('.', '/')}/{path.name}" for path in package_dir(package).glob("*.py")}
        assert expected <= built.wheel_files, expected - built.wheel_files
    assert "infuse/py.typed" in built.wheel_files


def test_wheel_holds_every_module_only_once_and_nothing_else(built: Built) -> None:
    tops = {name.partition("/")[0] for name in built.wheel_files}
    assert len(tops) == 3, tops
    assert {"infuse", "pytest_infuse.py"} < tops
    strays = [name for name in built.wheel_files if name.endswith((".so", ".o", ".pyc")) or "/tests/" in name]
    assert not strays


def test_wheel_without_kernels_is_pure(built: Built) -> None:
    assert built.wheel.name.endswith("-py3-none-any.whl")


def test_wheel_and_sdist_hold_every_cuda_source(built: Built) -> None:
    sources = csrc_files()
    assert any(name.endswith(".cuh") for name in sources)
    assert any(name.endswith(".cu") for name in sources)
    assert {f"infuse/csrc/{name}" for name in sources} <= built.wheel_files
    assert {f"csrc/{name}" for name in sources} <= built.sdist_files


def test_sdist_holds_what_a_build_and_a_test_run_need(built: Built) -> None:
    needed = {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt", "Makefile"}
    needed |= {"tests/conftest.py", "examples/softsign_gate.py"}
    needed |= {"src/infuse/version.py", "src/infuse/py.typed", ".ci/typecheck.py"}
    assert needed <= built.sdist_files, needed - built.sdist_files


def test_metadata(built: Built) -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src" / "infuse" / "version.py").read_text())
    assert version
    assert (built.metadata["Name"], built.metadata["Version"]) == ("infuse", version.group(1))
    assert built.metadata["License-Expression"] == "BSD-3-Clause"
    assert built.metadata["Requires-Python"] == ">=3.10"
    required = {line for line in built.metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {"torch>=2.11", "numpy", "ninja", "filelock"}
    assert set(built.metadata.get_all("Provides-Extra", [])) == {"models", "demo", "flash-attention-3", "test", "dev"}


def test_entry_points(built: Built) -> None:
    assert "[torch_dynamo_backends]\ninfuse = infuse.backend:infuse" in built.entry_points
    assert "[pytest11]\npytest_infuse = pytest_infuse" in built.entry_points
    assert "[console_scripts]\ninfuse = infuse.cli:main" in built.entry_points


def test_the_pytest_plugin_of_the_wheel_works(built: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "test_it.py").write_text("def test_it(infuse):\n    assert infuse.path.name == 'infuse.lock'\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "--infuse-update-lock", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_unknown_kernel_setting_is_refused(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "b")],
        cwd=copy_of_the_tree(tmp_path / "tree"),
        env={**os.environ, "INFUSE_BUILD_KERNELS": "yes"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode != 0
    assert "INFUSE_BUILD_KERNELS: expected 0, 1 or nothing, got 'yes'" in result.stderr


def requirement_name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", line.strip(), maxsplit=1)[0]).lower()


def test_constraints_pin_everything_that_the_project_names() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+(; python_version >= \"3\.\d+\")?", line) for line in lines)
    pinned = {requirement_name(line) for line in lines}
    assert "torch==2.13.0" in lines
    settings = project()
    named = {requirement_name(line) for line in settings["project"]["dependencies"]}
    for extra in settings["project"]["optional-dependencies"].values():
        named |= {requirement_name(line) for line in extra}
    assert named - {"infuse"} <= pinned, named - pinned
    assert {requirement_name(line) for line in settings["build-system"]["requires"]} <= pinned
