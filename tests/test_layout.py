"""The tree is as it is described: imports go one way, torch's private parts have few importers, names are literal."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "infuse": ROOT / "src" / "infuse",
    "infuse.ops": ROOT / "ops",
    "infuse.patterns": ROOT / "patterns",
    "infuse.lowering": ROOT / "lowering",
}

# A module imports lower ranks only, or its own rank inside its own package. Longest prefix wins.
RANKS = {
    "infuse.settings": 0,
    "infuse.report": 0,
    "infuse.build": 0,
    "infuse.version": 0,
    "infuse.caches": 0,
    "infuse.ops": 1,
    "infuse.patterns": 3,
    "infuse.lowering": 3,
    "infuse.history": 1,
    "infuse.backend": 4,
    "infuse.decorator": 5,
    "infuse.extension": 5,
    "infuse.testing": 5,
    "infuse.inspection": 5,
    "infuse.lock": 5,
    "infuse": 6,  # __init__ re-exports
    "infuse.models": 7,
    "infuse.cli": 8,
    "infuse.__main__": 9,
}
# What the package needs at import time; all else is an optional extra and imported where it is used.
REQUIRED = {"torch", "numpy", "ninja", "filelock"}
OPTIONAL_AT_IMPORT = ("infuse.models", "infuse.cli", "infuse.__main__")
INDUCTOR_IMPORTERS = (
    "infuse.lowering.inductor",
    "infuse.lowering.inductor_layouts",
    "infuse.lowering.inductor_sums",
    "infuse.lowering.inductor_timing",
    "infuse.backend",
)
MATCHER = re.compile(r"torch\._inductor\.(pattern_matcher|fx_passes)\b|torch\.fx\.(.*\.)?_|torch\.fx\.passes\b")


def modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([package, *parts])] = path
    return found


MODULES = modules()


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def unit(module: str) -> str:
    """The entry of RANKS that a module falls under."""
    entries = [entry for entry in RANKS if entry != "infuse" and within(module, entry)]
    return max(entries, key=len) if entries else module


def package_of(entry: str) -> str:
    """infuse.ops for what lies in it, infuse for the modules that lie directly in the root package."""
    return (
        entry
        if entry in ("infuse.ops", "infuse.patterns", "infuse.lowering", "infuse.models", "infuse.cli")
        else "infuse"
    )


def is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, (ast.Name, ast.Attribute)) and ast.unparse(test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def run_time_nodes(node: ast.AST, depth: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """Every node outside `if TYPE_CHECKING:`, with the number of functions around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for branch in child.orelse:
                yield branch, depth
                yield from run_time_nodes(branch, depth)
            continue
        yield child, depth
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from run_time_nodes(child, depth + inside)


def imported(node: ast.AST, module: str, is_package: bool, known: set[str]) -> list[str]:
    """The modules that an import statement or a dotted name (torch._inductor.config) reaches."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Attribute):
        name = ast.unparse(node)
        return [name] if re.fullmatch(r"torch\._inductor(\.\w+)*", name) else []
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, *([node.module] if node.module else [])])
    names = [f"{base}.{alias.name}" for alias in node.names]
    if within(base, "infuse"):
        return [name if name in known else base for name in names]
    return names


def complaint(module: str, target: str, at_import: bool) -> str:
    """Why `module` may not import `target`, "" if it may."""
    top = target.partition(".")[0]
    if within(target, "torch._inductor") or MATCHER.match(target):
        # The matcher belongs to patterns/, the rest of Inductor to the two that talk to it.
        if MATCHER.match(target) and within(module, "infuse.patterns"):
            return ""
        if within(target, "torch._inductor") and module in INDUCTOR_IMPORTERS:
            return ""
        return f"{module} imports {target}, a private part of torch that is another module's business"
    if top != "infuse":
        if at_import and top not in REQUIRED | set(sys.stdlib_module_names) and not within(module, *OPTIONAL_AT_IMPORT):
            return f"{module} imports {top} at import time, an optional package"
        if within(module, "infuse.ops") and top not in {"torch", *sys.stdlib_module_names}:
            return f"{module} imports {top}; an operator needs torch only"
        return ""
    mine, other = unit(module), unit(target)
    for name in (mine, other):
        if name not in RANKS:
            return f"{name} has no rank"
    if within(module, "infuse.ops") and not within(target, "infuse.ops", "infuse.build"):
        return f"{module} imports {target}; ops import torch and the library's loader only"
    same_package = RANKS[mine] == RANKS[other] and package_of(mine) == package_of(other)
    if RANKS[other] < RANKS[mine] or same_package:
        return ""
    return f"{module} (rank {RANKS[mine]}) imports {target} (rank {RANKS[other]})"


def violations(source: str, module: str, is_package: bool = False, known: set[str] | None = None) -> list[str]:
    """Every forbidden import in a module's source, in functions too."""
    found = []
    last = ""
    for node, depth in run_time_nodes(ast.parse(source)):
        for target in imported(node, module, is_package, set(MODULES) if known is None else known):
            part_of_last = last.startswith(
                target + "."
            )  # the walk reaches torch._inductor.config, then torch._inductor
            last = target
            text = complaint(module, target, at_import=depth == 0)
            if text and not part_of_last:
                found.append(text)
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


KNOWN = {"infuse", "infuse.backend", "infuse.lowering.inductor", "infuse.patterns.passes", "infuse.ops.rms_norm"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("infuse.ops.rms_norm", "from infuse.patterns import passes"),
        ("infuse.ops.rms_norm", "from infuse import backend"),
        ("infuse.ops.rms_norm", "from infuse.settings import Settings"),
        ("infuse.ops.rms_norm", "from ..backend import infuse"),
        ("infuse.ops.rms_norm", "def late():\n    import infuse.lowering.inductor"),
        ("infuse.ops.rms_norm", "import numpy"),
        ("infuse.patterns.passes", "from infuse.lowering import inductor"),
        ("infuse.lowering.rms_norm", "import infuse.patterns.passes"),
        ("infuse.lowering.rms_norm", "from torch._inductor import lowering"),
        ("infuse.lowering.rms_norm", "import torch\nconfig = torch._inductor.config"),
        (
            "infuse.lowering.inductor",
            "from torch._inductor.pattern_matcher import PatternMatcherPass\nimport infuse.backend",
        ),
        ("infuse.patterns.passes", "import torch._inductor.config"),
        ("infuse.backend", "from torch.fx._symbolic_trace import Tracer"),
        ("infuse.backend", "from infuse import explain_everything"),
        ("infuse.report", "import infuse"),
        ("infuse.report", "import rich"),
        ("infuse.unheard_of", "import infuse.settings"),
        (
            "infuse.settings",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import infuse.backend",
        ),
    ],
)
def test_import_checker_finds(module: str, source: str) -> None:
    assert len(violations(source, module, known=KNOWN)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("infuse.ops.rms_norm", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from infuse import backend"),
        ("infuse.ops.rms_norm", "import torch\nfrom infuse.ops import checks\nfrom infuse import build"),
        ("infuse.backend", "from infuse import patterns, lowering\nimport torch._inductor.custom_graph_pass"),
        ("infuse.patterns.passes", "from torch._inductor.pattern_matcher import PatternMatcherPass"),
        ("infuse.patterns.passes", "import torch.fx\nfrom torch.fx import Graph\nfrom torch.fx.node import Node"),
        ("infuse.report", "def show():\n    import rich"),
        ("infuse.cli.demo", "import infuse, rich\nfrom infuse.models import llama"),
    ],
)
def test_import_checker_allows(module: str, source: str) -> None:
    assert violations(source, module, known={*KNOWN, "infuse.patterns", "infuse.lowering", "infuse.build"}) == []


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("name", ["ops", "patterns", "lowering"])
def test_import_under_the_folders_name_is_refused(name: str) -> None:
    result = python(f"import {name}")
    assert result.returncode != 0
    assert f"write `import infuse.{name}` instead" in result.stderr


def test_import_has_no_effect_on_torch_or_the_process() -> None:
    result = python("""
import sys, threading, torch

def state():
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), threading.active_count()

before = state()
import infuse
assert state() == before, (before, state())
assert not torch.cuda.is_initialized()
extras = {"torchtune", "torchao", "transformers", "rich", "matplotlib", "triton"} & set(sys.modules)
assert not extras, extras
""")
    assert result.returncode == 0, result.stderr


def test_nothing_in_the_root_shadows_the_package() -> None:
    assert not [path.name for path in ROOT.iterdir() if path.name in ("infuse", "infuse.py")]


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True, check=False)
    paths = [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    if not paths:
        pytest.skip("needs a git checkout to know which files are the project's")
    return paths


def test_no_file_is_called_utils() -> None:
    assert not [path for path in tracked_files() if path.stem in ("utils", "util", "helpers", "misc")]


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    path_of_a_machine = re.compile(rb"(?<![\w.])/(?:home|Users|root|work|workspace|mnt)/\w+")
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        for match in path_of_a_machine.finditer(path.read_bytes())
    ]
    assert not found


def test_no_build_file_names_a_package_index() -> None:
    index = re.compile(r"index-url|pypi[.]org|pythonhosted|download[.]pytorch|https?://[^\s)]*simple")
    names = ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", "MANIFEST.in", ".ci/run", ".ci/typecheck.py")
    assert not [name for name in names if index.search((ROOT / name).read_text())]
