"""What every test gets: a fresh compiler without caches, seed 0, few threads, a skip where it needs a missing GPU."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

# Before torch is imported: its pool of compile processes would be one more per test process.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
import torch._dynamo
import torch._dynamo.guards
import torch._inductor.config
from torch._inductor.utils import fresh_cache

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
MAX_THREADS = 4  # the tensors of the tests are small; more threads only wait for each other


def compile_once() -> None:
    """Inductor's compiler of C++, for all processes of this run: what compiled_once/g++ says."""
    compiler = str(Path(__file__).parent / "compiled_once" / "g++")
    if "CXX" not in os.environ and all(shutil.which(program) for program in ("g++", "sha256sum", compiler)):
        folder = os.environ["INFUSE_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="infuse-tests-")
        os.environ["CXX"] = compiler
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        torch._inductor.config.cpp.cxx = (None, compiler)


def pytest_configure(config: pytest.Config) -> None:
    compile_once()
    torch.set_num_threads(1 if IN_WORKER else min(MAX_THREADS, torch.get_num_threads()))
    # For a line of its log Dynamo times each graph's guards behind emptied caches: a tenth of a test that captures.
    torch._dynamo.guards.profile_guard_manager = lambda root, local_scope, iterations: 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and torch.version.hip is None:
        return
    skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; torch {torch.__version__} finds none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """The collector need not look through torch, sympy and the tests themselves each time: a fifth of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Dynamo without memory, the seed at 0, and no compiler caches, or with @pytest.mark.caches empty ones of its own.

    A warm cache skips the rewriting passes, so a test of what they do would see nothing.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    with ExitStack() as stack:
        if request.node.get_closest_marker("caches"):
            stack.enter_context(fresh_cache(dir=str(tmp_path)))
        else:
            stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        yield
    torch._dynamo.reset()


@pytest.fixture
def kernels() -> Iterator[None]:
    """The compiled kernels must be there, and a fault belongs to the test that caused it."""
    from infuse.ops import library

    reason = library.missing(torch.device("cuda"))
    assert not reason, f"these tests need the compiled kernels: {reason}"
    yield
    torch.cuda.synchronize()
