"""torch.compile's caches across processes: warm when nothing changed, cold when Infuse did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infuse import caches

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import json, sys, torch, infuse
from torch._dynamo.utils import counters

def by_hand(x, w):                       # the operator itself, whose backward is an operator of its own
    return torch.ops.infuse.rms_norm(x, w, 1e-6)

def spelled(x, w):                       # what the rewrite turns into the operator
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

torch.manual_seed(0)
x, w = torch.randn(4, 16, requires_grad=True), torch.randn(16, requires_grad=True)
result = {}
for function in (by_hand, spelled):
    y = torch.compile(function, backend="infuse")(x, w)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    result[function.__name__] = dx.norm().item()
result["hits"] = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
result["file"] = infuse.__file__
print(json.dumps(result))
"""


def link_farm(folder: Path) -> Path:
    """A copy of the package as one folder `infuse`, to edit."""
    package = folder / "infuse"
    shutil.copytree(ROOT / "src" / "infuse", package, ignore=shutil.ignore_patterns("__pycache__", "_lib"))
    for name in ("ops", "patterns", "lowering", "csrc"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def run(path: Path, cache: Path) -> dict[str, float]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(path),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert str(path) in str(result["file"])
    return result


def test_a_second_process_is_warm_and_a_changed_backward_is_not(tmp_path: Path) -> None:
    package = link_farm(tmp_path)
    cache = tmp_path / "cache"
    cold = run(tmp_path, cache)
    warm = run(tmp_path, cache)
    assert cold["hits"] == 0 and warm["hits"] >= 2
    assert warm["by_hand"] == cold["by_hand"] and warm["spelled"] == cold["spelled"]

    source = package / "ops" / "rms_norm.py"
    text = source.read_text()
    changed = text.replace("    dx = rstd * (g - ", "    dx = 10 * rstd * (g - ")
    assert changed != text
    source.write_text(changed)
    edited = run(tmp_path, cache)
    assert edited["hits"] == 0
    assert edited["by_hand"] == pytest.approx(10 * cold["by_hand"], rel=1e-5)


def test_the_hash_is_in_the_key_of_both_caches_once() -> None:
    caches.tag_caches()
    caches.tag_caches()
    assert torch.compiler.config.cache_key_tag.count(caches.build_hash()) == 1


def test_a_tag_of_the_user_is_kept() -> None:
    with torch.compiler.config.patch(cache_key_tag="mine"):
        caches.tag_caches()
        assert torch.compiler.config.cache_key_tag == f"mine;infuse-{caches.build_hash()}"
