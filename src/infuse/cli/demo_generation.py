"""The demo's third stage: the trained decoder as a Hugging Face folder, and what `infuse generate` writes from it."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from infuse import backend
from infuse.cli import generate, generate_request, generate_run
from infuse.cli.demo_plan import Plan, promise, spread, synchronize
from infuse.cli.demo_rewrites import promise_all_sites
from infuse.cli.generate_request import Request
from infuse.cli.generate_run import Timing
from infuse.cli.terminal import say, show_table, waiting
from infuse.models import text
from infuse.models.checkpoint import save_checkpoint
from infuse.models.config import ModelConfig
from infuse.models.shard import whole_model
from infuse.models.sharded import ShardChain, ShardedGeneralModel
from infuse.models.writing import pieces
from infuse.report import Report, SiteRecord

# Infuse compiles first. Kernels of stock's that have the same source are then there already: its first call is shorter.
COMPILED = ("--mode", "default", "--compile")
OPTIONS = {
    "eager": ("--compile", "eager"),
    "infuse": (*COMPILED, "infuse"),
    "stock": (*COMPILED, "inductor"),
    "eager, 2 shards": ("--compile", "eager", "--shards", "2"),
}
VARIANTS = tuple(OPTIONS)
SAMPLING = ("--top-k", "10", "--temperature", "0.7")


@dataclass(slots=True)
class Variant:
    """first_call_s: compilation included. tokens_per_s: of each timed round, after the prompt."""

    first_call_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return spread(self.tokens_per_s)[0]


@dataclass(frozen=True, slots=True)
class Generation:
    """smallest_margin: how far the likeliest token's logit was ahead of the next, where that was closest."""

    variants: dict[str, Variant]
    smallest_margin: float
    rewritten: dict[str, int]
    greedy: str
    sampled: str
    folder: str


@dataclass(frozen=True, slots=True)
class _Writer:
    """One variant's decoder, and what it is asked for."""

    request: Request
    chain: ShardChain

    def tokens(self, timing: Timing | None = None) -> list[int]:
        return [int(chosen) for chosen in self.steps(timing)]

    def steps(self, timing: Timing | None = None) -> Iterator[Tensor]:
        return generate_run.steps(self.request, self.chain, self.request.prompts[0], timing or Timing())


def write(plan: Plan, trained: nn.Module) -> Generation:
    """Raises DemoFailed if a site is not rewritten, or if the variants don't choose the same tokens."""
    folder = _save(plan, trained)
    writers = {name: _open(plan, folder, *options) for name, options in OPTIONS.items()}
    torch.compiler.reset()  # what was compiled for training is done with
    variants = {name: Variant() for name in VARIANTS}
    rewritten = _first_calls(plan, writers, variants)
    say(
        f"greedy, batch 1: {writers['eager'].request.longest} tokens of prompt at once and {plan.new_tokens} new ones, "
        "a step for each; stock is torch.compile without Infuse"
    )
    margin = _compare(writers, variants)
    with torch.compiler.set_stance("fail_on_recompile"):
        for round_ in range(plan.rounds):
            _round(plan, writers, variants, round_)
    _show(variants, margin)
    say("the likeliest token each time, the same from all (the prompt ends at the bar):", style="bold")
    greedy = _stream(plan, writers["infuse"])
    say("drawn from the 10 likeliest, by Infuse:", style="bold")
    drawing = generate_request.check(_arguments(plan, folder, *OPTIONS["infuse"], *SAMPLING))
    sampled = _stream(plan, _Writer(drawing, writers["infuse"].chain))
    return Generation(variants, margin, rewritten, greedy, sampled, str(folder))


def command(plan: Plan, folder: str) -> str:
    """What goes on writing after the demo."""
    return (
        f"python -m infuse generate --checkpoint {shlex.quote(folder)} --prompt {shlex.quote(plan.prompt.split()[0])}"
    )


def _save(plan: Plan, trained: nn.Module) -> Path:
    """Writes config.json, the weights and a tokenizer; an earlier demo's are replaced."""
    sizes = plan.config
    config = ModelConfig(
        vocab_size=sizes.vocab_size,
        embed_dim=sizes.embed_dim,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_seq_len=sizes.max_seq_len,
        intermediate_dim=sizes.intermediate_dim,
        num_layers=sizes.num_layers,
        norm_eps=sizes.norm_eps,
        rope_base=float(sizes.rope_base),
        tie_word_embeddings=False,
        model_type="llama",
    )
    model = ShardedGeneralModel(config, whole_model("demo", sizes.num_layers))
    model.model.load_state_dict(trained.state_dict())
    folder = plan.output / "model"
    for earlier in folder.glob("model.safetensors"):
        earlier.unlink()
    save_checkpoint([model], folder)
    text.byte_tokenizer().save(str(folder / "tokenizer.json"))
    say(f"saved as a Hugging Face folder: {folder}")
    return folder


def _arguments(plan: Plan, folder: Path, *options: str) -> argparse.Namespace:
    words = ["--checkpoint", str(folder), "--prompt", plan.prompt, "--max-tokens", str(plan.new_tokens)]
    return generate.parser().parse_args([*words, "--device", str(plan.device), "--seed", str(plan.seed), *options])


def _open(plan: Plan, folder: Path, *options: str) -> _Writer:
    request = generate_request.check(_arguments(plan, folder, *options))
    return _Writer(request, generate_run.load_chain(request))


def _first_calls(plan: Plan, writers: dict[str, _Writer], variants: dict[str, Variant]) -> dict[str, int]:
    sites: list[SiteRecord] = []
    stop = backend.on_rewrite(sites.extend)
    try:
        for name, writer in writers.items():
            begin = time.perf_counter()
            with waiting(f"first call of {name}"):
                generate_run.first_steps(writer.request, writer.chain)
                synchronize(plan.device)
            variants[name].first_call_s = time.perf_counter() - begin
    finally:
        stop()
    report = Report(tuple(sites), graphs=1)
    promise_all_sites("the decode step", report, plan.config)
    return report.rewritten


def _compare(writers: dict[str, _Writer], variants: dict[str, Variant]) -> float:
    """Fills in tokens; returns eager's smallest margin. Raises DemoFailed where a token differs."""
    for name, writer in writers.items():
        variants[name].tokens = writer.tokens()
    expected = variants["eager"].tokens
    margins = _margins(writers["eager"], expected)
    for name, variant in variants.items():
        for place, (token, other) in enumerate(zip(variant.tokens, expected, strict=True)):
            promise(
                token == other,
                f"generation: token {place}: got {token} from {name}, expected {other} as from eager, whose margin "
                f"there is {margins[place]:.1e}",
            )
    return min(margins)


def _margins(eager: _Writer, written: list[int]) -> list[float]:
    """Of each new token: its logit less the next likeliest one's, in one pass over the whole text."""
    (prompt,) = eager.request.prompts
    logits = eager.chain.generate(torch.tensor([prompt + written[:-1]]))[0, len(prompt) - 1 :]
    best = logits.topk(2, -1).values
    margins: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return margins


def _round(plan: Plan, writers: dict[str, _Writer], variants: dict[str, Variant], round_: int) -> None:
    """Every variant once; who begins changes from round to round."""
    for offset in range(len(VARIANTS)):
        name = VARIANTS[(round_ + offset) % len(VARIANTS)]
        synchronize(plan.device)
        timing = Timing()
        tokens = writers[name].tokens(timing)
        promise(
            tokens == variants["eager"].tokens, f"generation: {name} chose other tokens in timed round {round_ + 1}"
        )
        assert timing.tokens_per_s is not None
        variants[name].tokens_per_s.append(timing.tokens_per_s)


def _show(variants: dict[str, Variant], margin: float) -> None:
    rows = []
    for name, variant in variants.items():
        median, low, high = spread(variant.tokens_per_s)
        rows.append(
            (
                name,
                f"{variant.first_call_s:.1f} s",
                f"{median:,.0f}",
                f"{low:,.0f} - {high:,.0f}",
                f"{median / variants['eager'].median:.2f}",
                "same" if variant.tokens == variants["eager"].tokens else "DIFFERENT",
            )
        )
    columns = ("generation", "first call", "tokens/s", "p20 - p80", "x eager", "tokens")
    show_table(columns, rows)
    say(
        f"the closest choice had a margin of {margin:.1e}. First calls compile; stock comes second and finds those "
        "kernels built that have the same source as Infuse's."
    )


def _stream(plan: Plan, writer: _Writer) -> str:
    """Shows a text as it comes, indented; returns all of it, the prompt included."""
    written = plan.prompt
    print("  " + _shown(f"{plan.prompt}|"), end="")
    for piece in pieces(writer.steps(), writer.request.tokenizer):
        print(_shown(piece), end="", flush=True)
        written += piece
    print()
    return written


def _shown(piece: str) -> str:
    """Indented, without the control characters that a model which has learned little may write to the terminal."""
    visible = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in piece)
    return visible.replace("\n", "\n  ")
