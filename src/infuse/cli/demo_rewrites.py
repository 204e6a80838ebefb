"""The demo's first stage: what Infuse rewrites in two authors' Llama-3, before anything runs."""

from __future__ import annotations

import dataclasses

import torch

from infuse.cli.demo_plan import Plan, promise
from infuse.cli.terminal import say
from infuse.inspection import explain
from infuse.models import llama
from infuse.models.llama import LlamaConfig
from infuse.report import Report


def explain_models(plan: Plan) -> dict[str, Report]:
    """Prints and returns the reports by the names that `infuse explain` knows.

    Raises DemoFailed unless every norm, attention and SwiGLU of both was found and rewritten.
    """
    models = {
        "torchtune-llama3": ("torchtune's Llama-3", llama.torchtune_llama3, plan.config),
        # Two layers show all there is to see; a deeper table only repeats them.
        "hf-llama": (
            "Hugging Face's LlamaForCausalLM",
            llama.hugging_face_llama,
            dataclasses.replace(plan.config, num_layers=min(2, plan.config.num_layers)),
        ),
    }
    reports = {}
    for name, (title, make, config) in models.items():
        say(f"infuse.explain: {title}, {config.num_layers} layer{'s' * (config.num_layers > 1)}")
        tokens = torch.zeros(1, config.max_seq_len, dtype=torch.int64, device=plan.device)
        reports[name] = explain(make(config).to(plan.device), tokens)
        reports[name].print()
        promise_all_sites(title, reports[name], config)
    return reports


def promise_all_sites(title: str, report: Report, config: LlamaConfig) -> None:
    """A layer has an attention with rotated q and k, a SwiGLU and two norms, and one more norm ends the decoder."""
    got = report.rewritten
    norms = got.get("rms_norm", 0) + got.get("add_rms_norm", 0)
    found = (got.get("attention", 0), got.get("swiglu", 0), got.get("rope", 0), norms)
    expected = (config.num_layers, config.num_layers, 2 * config.num_layers, 2 * config.num_layers + 1)
    promise(
        found == expected and not report.refused and report.graphs == 1,
        f"{title}: rewrites: got {report.summary()}, expected "
        f"attention {expected[0]}, swiglu {expected[1]}, rope {expected[2]}, norms {expected[3]}, nothing refused, "
        "one graph",
    )
