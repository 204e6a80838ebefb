"""Check an installed wheel: every package is in it with its data, and torch.compile finds and runs the backend.

Run from the checkout's root as `python - < .ci/installed.py` with the Python of an environment that holds the wheel.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import re
import shutil
import sys
from pathlib import Path

import torch

root = Path.cwd()
assert sys.path[0] == "", "run me from stdin, so that the checkout's root is on sys.path"

assert "infuse" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
print("torch.compile lists the backend infuse without an import of infuse")

infuse = importlib.import_module("infuse")
assert infuse.__file__ is not None
assert Path(sys.prefix) in Path(infuse.__file__).parents, f"not the installed one: {infuse.__file__}"

text = (root / "pyproject.toml").read_text()
listed = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
assert listed
packages = re.findall(r'"([\w.]+)"', listed.group(1))
for package in packages:
    importlib.import_module(package)
print("imported", *packages)

for name in ("ops", "patterns", "lowering"):
    modules = [path.stem for path in (root / name).glob("*.py") if path.stem != "__init__"]
    for module in modules:
        importlib.import_module(f"infuse.{name}.{module}")
    print(f"imported {len(modules)} modules of infuse.{name}")

package = importlib.resources.files("infuse")
kinds = (".cu", ".cuh", ".cpp", ".h")
sources = [path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*") if path.suffix in kinds]
missing = [source for source in sources if not package.joinpath(source).is_file()]
assert sources and not missing, missing
print(f"found {len(sources)} CUDA and C++ sources in infuse/csrc")

library = importlib.import_module("infuse.build").find_library()
if shutil.which("nvcc"):
    assert library is not None and Path(sys.prefix) in library.parents, f"the wheel has no usable kernels: {library}"
    print("found the kernel library,", f"{library.stat().st_size / 2**20:.1f} MiB")

requirements = importlib.metadata.requires("infuse") or []
assert "torch>=2.11" in requirements, requirements


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


x, weight = torch.randn(8, 64), torch.randn(64)
torch.testing.assert_close(torch.compile(norm, backend="infuse")(x, weight), norm(x, weight))
print('torch.compile(..., backend="infuse") is right on the CPU')
