"""The demo's third stage: the trained decoder writes over a KV cache: eager, with Infuse, with stock torch.compile."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from infuse import backend
from infuse.cli.demo_plan import Plan, promise, spread, synchronize
from infuse.cli.demo_rewrites import promise_all_sites
from infuse.cli.terminal import say, show_table, waiting
from infuse.models import llama, text
from infuse.models.generate import Generated, Step, decode_step, generate, set_up_cache
from infuse.report import Report, SiteRecord

# Infuse compiles first. Kernels of stock's that have the same source are then there already: its first call is shorter.
BACKENDS = {"eager": None, "infuse": "infuse", "stock": "inductor"}
VARIANTS = tuple(BACKENDS)
TOP_K, TEMPERATURE = 10, 0.7


@dataclass(slots=True)
class Variant:
    """first_call_s: compilation included. tokens_per_s: of each timed round, a token being one run of the step."""

    first_call_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logits_difference: float = 0.0  # largest, from eager's
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


def write(plan: Plan, trained: nn.Module) -> Generation:
    """Raises DemoFailed if a site is not rewritten, or if the variants don't choose the same tokens."""
    model = llama.torchtune_llama3(plan.config).to(plan.device)
    model.load_state_dict(trained.state_dict())
    prompt = text.encode(plan.prompt).unsqueeze(0).to(plan.device)
    length = prompt.shape[1] + plan.new_tokens
    set_up_cache(model, batch_size=1, length=length)
    torch.compiler.reset()  # what was compiled for training is done with
    steps = _steps(model)
    variants = {name: Variant() for name in VARIANTS}
    rewritten = _first_calls(plan, model, steps, variants, prompt)
    say(
        f"greedy, batch 1: {prompt.shape[1]} tokens of prompt and {plan.new_tokens} new ones, a step for each; "
        "stock is torch.compile without Infuse"
    )
    answers = {name: generate(model, steps[name], prompt, plan.new_tokens, keep_logits=True) for name in VARIANTS}
    margin = _compare(answers, variants, prompt.shape[1])
    with torch.compiler.set_stance("fail_on_recompile"):
        for round_ in range(plan.rounds):
            _round(plan, model, steps, variants, prompt, round_)
    _show(variants, margin)
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    drawn = generate(
        model, steps["infuse"], prompt, plan.new_tokens, top_k=TOP_K, temperature=TEMPERATURE, generator=generator
    )
    result = Generation(variants, margin, rewritten, text.decode(answers["infuse"].tokens), text.decode(drawn.tokens))
    _show_text("the likeliest token each time, the same from all three", plan.prompt, result.greedy)
    _show_text(f"drawn from the {TOP_K} likeliest, by Infuse", plan.prompt, result.sampled)
    return result


def _steps(model: nn.Module) -> dict[str, Step]:
    def step(backend: str | None) -> Step:
        plain = decode_step(model)
        return torch.compile(plain, backend=backend, dynamic=False, fullgraph=True) if backend else plain

    return {name: step(backend) for name, backend in BACKENDS.items()}


def _first_calls(
    plan: Plan, model: nn.Module, steps: dict[str, Step], variants: dict[str, Variant], prompt: Tensor
) -> dict[str, int]:
    sites: list[SiteRecord] = []
    stop = backend.on_rewrite(sites.extend)
    try:
        for name in VARIANTS:
            begin = time.perf_counter()
            with waiting(f"first call of {name}"):
                generate(model, steps[name], prompt[:, :1], 1)
                synchronize(plan.device)
            variants[name].first_call_s = time.perf_counter() - begin
    finally:
        stop()
    report = Report(tuple(sites), graphs=1)
    promise_all_sites("the decode step", report, plan.config)
    return report.rewritten


def _compare(answers: dict[str, Generated], variants: dict[str, Variant], prompt_len: int) -> float:
    """Fills in tokens and differences; returns eager's smallest margin. Raises DemoFailed where a token differs."""
    expected = answers["eager"]
    assert expected.logits is not None
    best = expected.logits[0].float().topk(2, -1).values
    margins = best[:, 0] - best[:, 1]
    for name, answer in answers.items():
        assert answer.logits is not None
        variants[name].tokens = answer.tokens[0, prompt_len:].tolist()
        variants[name].logits_difference = (answer.logits - expected.logits).abs().max().item()
        different = (answer.tokens != expected.tokens)[0].nonzero().flatten().tolist()
        if different:
            place = different[0]
            promise(
                False,
                f"generation: token {place - prompt_len}: got {int(answer.tokens[0, place])} from {name}, "
                f"expected {int(expected.tokens[0, place])} as from eager, whose margin there is "
                f"{margins[place - prompt_len].item():.1e}",
            )
    return margins.min().item()


def _round(
    plan: Plan, model: nn.Module, steps: dict[str, Step], variants: dict[str, Variant], prompt: Tensor, round_: int
) -> None:
    """Every variant once; who begins changes from round to round."""
    for offset in range(len(VARIANTS)):
        name = VARIANTS[(round_ + offset) % len(VARIANTS)]
        synchronize(plan.device)
        begin = time.perf_counter()
        answer = generate(model, steps[name], prompt, plan.new_tokens)
        synchronize(plan.device)
        seconds = time.perf_counter() - begin
        tokens = answer.tokens[0, prompt.shape[1] :].tolist()
        promise(
            tokens == variants["eager"].tokens, f"generation: {name} chose other tokens in timed round {round_ + 1}"
        )
        variants[name].tokens_per_s.append((answer.tokens.shape[1] - 1) / seconds)


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
    difference = max(variant.logits_difference for variant in variants.values())
    say(
        f"the logits differ by at most {difference:.1e}; the closest choice had a margin of {margin:.1e}. "
        "First calls compile; stock comes second and finds those kernels built that have the same source as Infuse's."
    )


def _show_text(title: str, prompt: str, written: str) -> None:
    say(f"{title} (the prompt ends at the bar):", style="bold")
    say("\n".join(f"  {line}" for line in f"{prompt}|{written[len(prompt) :]}".rstrip().splitlines()))
