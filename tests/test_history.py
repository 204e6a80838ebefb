"""infuse.last_report: what it holds after torch.compile has run, cold and warm, and what empties it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

import infuse
from infuse import backend, history
from infuse.report import Report

ROOT = Path(__file__).resolve().parents[1]


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def half_norm(x: Tensor) -> Tensor:
    return norm(x.bfloat16())


def compiled(function: Any, **options: Any) -> Any:
    """Compiled without generating code: what is tested comes before."""

    def no_code(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        backend.inductor_config(None, options)["pre_grad_custom_pass"](gm.graph)
        gm.recompile()
        return gm.forward

    return torch.compile(function, backend=no_code)


def test_it_says_so_when_there_was_nothing() -> None:
    assert infuse.last_report() == Report(notes=(history.NOTHING,))


@pytest.mark.parametrize("by_options", [False, True])
def test_it_lists_the_sites_of_what_was_compiled(by_options: bool) -> None:
    arguments: dict[str, Any] = {"options": infuse.options()} if by_options else {"backend": "infuse"}
    torch.compile(norm, **arguments)(torch.randn(3, 16))
    report = infuse.last_report()
    assert (report.rewritten, report.graphs, report.notes) == ({"rms_norm": 1}, 1, ())
    assert report.sites[0].source.startswith("tests/test_history.py:") and report.sites[0].kernel


def test_graphs_of_several_functions_and_of_graph_breaks_are_merged() -> None:
    def broken(x: Tensor) -> Tensor:
        x = norm(x)
        torch._dynamo.graph_break()
        return norm(x)

    compiled(broken)(torch.randn(3, 16))
    compiled(half_norm)(torch.randn(3, 16))
    report = infuse.last_report()
    assert (report.rewritten, report.refused, report.graphs) == ({"rms_norm": 2}, {"rms_norm": 1}, 3)


def test_a_recompilation_takes_the_place_of_the_one_before() -> None:
    function = compiled(norm)
    for rows in (3, 4):
        function(torch.randn(rows, 16))
    report = infuse.last_report()
    assert (report.rewritten, report.graphs) == ({"rms_norm": 1}, 1)
    assert report.notes == ("1 earlier compilations of the same code are left out",)
    assert infuse.last_report(recompilations=True).graphs == 2


def test_a_frame_that_is_traced_again_counts_once() -> None:
    past = history.History()
    with torch._guards.compile_context(
        torch._guards.CompileContext(torch._guards.CompileId(frame_id=0, frame_compile_id=0))
    ) as context:
        for attempt in range(3):
            context.attempt = attempt
            for _ in range(2):  # a subgraph and the graph
                past.begin()
                past.add([infuse.SiteRecord("rms_norm", "rewritten", "mul")])
    assert (past.report().rewritten, past.report().graphs) == ({"rms_norm": 2}, 1)


@pytest.mark.parametrize("reset", [torch._dynamo.reset, infuse.reset_report])
def test_resetting_empties_it(reset: Any) -> None:
    compiled(norm)(torch.randn(3, 16))
    assert infuse.last_report().graphs == 1
    reset()
    assert infuse.last_report().graphs == 0


def test_explaining_leaves_no_trace() -> None:
    infuse.explain(norm, torch.randn(3, 16))
    assert infuse.last_report().graphs == 0


def test_subgraphs_are_explained_as_they_are_compiled() -> None:
    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)  # type: ignore[no-any-return]

    report = infuse.explain(checkpointed, torch.randn(3, 16, requires_grad=True), training=True)
    assert (report.rewritten, report.graphs) == ({"rms_norm": 1}, 1)


def test_a_choice_of_the_lowering_reaches_its_site() -> None:
    def chooses(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        config = backend.inductor_config("max-autotune", {})
        config["pre_grad_custom_pass"](gm.graph)
        nodes = [node for node in gm.graph.nodes if "infuse_site" in node.meta.get("custom", {})]
        identity = nodes[1].meta["custom"]["infuse_site"]
        torch._dynamo.utils.counters["inductor"][f"infuse choice {identity} kernel_3 (measured)"] += 1
        gm.recompile()
        return gm.forward

    def twice(x: Tensor) -> Tensor:
        return norm(norm(x) + 1)

    torch.compile(twice, backend=chooses)(torch.randn(3, 16))
    kernels = [site.kernel for site in infuse.last_report().sites]
    assert kernels[1] == "kernel_3 (measured)" and "measured" not in kernels[0]
    assert not [key for key in torch._dynamo.utils.counters["inductor"] if key.startswith("infuse choice")]


def test_a_refusal_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="infuse"):
        for _ in range(2):
            torch._dynamo.reset()
            compiled(half_norm)(torch.randn(3, 16))
    messages = [record.getMessage() for record in caplog.records if "stays as it is" in record.getMessage()]
    assert len(messages) == 1 and "rms_norm" in messages[0] and "remedy" in messages[0]


STRICT = {
    "backend": lambda: torch.compile(half_norm, backend="infuse", options={"infuse.strict": True}),
    "options": lambda: torch.compile(half_norm, options=infuse.options(strict=True)),
    "decorator": lambda: infuse.fuse(half_norm, strict=True),
    "explain": lambda: lambda x: infuse.explain(half_norm, x, options={"infuse.strict": True}),
}


@pytest.mark.parametrize("route", STRICT)
def test_strict_is_an_error_on_every_route(route: str) -> None:
    expected = (BackendCompilerFailed, InductorError, infuse.StrictError)
    with pytest.raises(expected, match=r"(?s)infuse.strict: 1 sites were refused.*test_history.py.*remedy"):
        STRICT[route]()(torch.randn(3, 16))


def test_strict_is_about_the_families_that_are_switched_on() -> None:
    compiled(half_norm, **{"infuse.strict": True, "infuse.patterns": ["swiglu"]})(torch.randn(3, 16))
    assert infuse.last_report().sites == ()


PROGRAM = """
import sys, torch, infuse
from torch._dynamo.utils import counters
from infuse import backend
from infuse.report import Placement

# Kept up to the lowering, which has no kernel here and says so.
backend.place = lambda *args, **keywords: Placement("default", "to be chosen")

torch.set_grad_enabled(False)

class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))
    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

def refused(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

for arguments in ({"backend": "infuse", "options": {"infuse.kernels": sys.argv[1]}},
                  {"options": infuse.options(kernels=sys.argv[1])}):
    torch._dynamo.reset()
    torch.compile(torch.nn.Sequential(Norm()), **arguments)(torch.randn(4, 16))
    torch.compile(refused, **arguments)(torch.randn(4, 16).bfloat16())
    print(infuse.last_report().to_json().replace(chr(10), ""))
print(counters["aot_autograd"]["autograd_cache_hit"])
"""


def run(cache: Path, kernels: str = "auto") -> tuple[list[Report], int]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, kernels]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *reports, hits = done.stdout.splitlines()
    return [Report.from_json(text) for text in reports], int(hits)


def test_a_second_process_with_warm_caches_reports_the_same(tmp_path: Path) -> None:
    cold, _ = run(tmp_path)
    warm, hits = run(tmp_path)
    assert hits == 4
    assert warm == cold
    for report in cold:
        assert (report.rewritten, report.refused, report.graphs) == ({"rms_norm": 1}, {"rms_norm": 1}, 2)
        assert report.sites[0].module == "0" and report.sites[1].remedy
        assert report.sites[0].kernel == "decomposition (no kernel for cpu)"
    _, hits = run(tmp_path, "never")
    assert hits == 2  # in the second half: other settings are another key, whatever the graph
