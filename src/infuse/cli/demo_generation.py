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
# fp32 in another order of summation: some 1e-5 of logits that are about 10.
MAX_LOGITS_DIFFERENCE = 1e-3


@dataclass(slots=True)
class Variant:
    """first_call_s: compilation included. greedy, drawn: the new tokens. logits_difference: greedy's, largest from eager's.
    tokens_per_s: of each timed round, a token being one run of the step.
    """

    first_call_s: float = 0.0
    greedy: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    logits_difference: float = 0.0
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
    greedy_text: str
    drawn_text: str


def write(plan: Plan, trained: nn.Module) -> Generation:
    """Raises DemoFailed if a site is not rewritten, or if the variants don't choose the same tokens."""
    model = llama.torchtune_llama3(plan.config).to(plan.device)
    model.load_state_dict(trained.state_dict())
    prompt = text.encode(plan.prompt).unsqueeze(0).to(plan.device)
    set_up_cache(model, batch_size=1, length=prompt.shape[1] + plan.new_tokens)
    torch.compiler.reset()  # what was compiled for training is done with
    steps = _steps(model)
    variants = {name: Variant() for name in VARIANTS}
    rewritten = _first_calls(plan, model, steps, variants, prompt)
    say(
        f"greedy, batch 1: {prompt.shape[1]} tokens of prompt and {plan.new_tokens} new ones, a step for each; "
        "stock is torch.compile without Infuse"
    )
    with torch.compiler.set_stance("fail_on_recompile"):
        greedy = {name: generate(model, steps[name], prompt, plan.new_tokens, keep_logits=True) for name in VARIANTS}
        drawn = {name: _draw(plan, model, steps[name], prompt) for name in VARIANTS}
        margin = _compare(greedy, drawn, variants, prompt.shape[1])
        for round_ in range(plan.rounds):
            _round(plan, model, steps, variants, prompt, round_)
    _show(variants, margin)
    texts = [text.decode(answers["infuse"].tokens) for answers in (greedy, drawn)]
    _show_text("the likeliest token each time, the same from all three", plan.prompt, texts[0])
    _show_text(f"drawn from the {TOP_K} likeliest with one seed, the same from all three", plan.prompt, texts[1])
    return Generation(variants, margin, rewritten, *texts)


def _draw(plan: Plan, model: nn.Module, step: Step, prompt: Tensor) -> Generated:
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    return generate(model, step, prompt, plan.new_tokens, top_k=TOP_K, temperature=TEMPERATURE, generator=generator)


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


def _compare(
    greedy: dict[str, Generated], drawn: dict[str, Generated], variants: dict[str, Variant], prompt_len: int
) -> float:
    """Fills in tokens and differences; returns eager's smallest margin. Raises DemoFailed where a token differs."""
    logits = greedy["eager"].logits
    assert logits is not None
    best = logits[0].float().topk(2, -1).values
    margins: list[float] = (best[:, 0] - best[:, 1]).tolist()
    for name, variant in variants.items():
        answer = greedy[name]
        assert answer.logits is not None
        variant.greedy = answer.tokens[0, prompt_len:].tolist()
        variant.drawn = drawn[name].tokens[0, prompt_len:].tolist()
        variant.logits_difference = (answer.logits - logits).abs().max().item()
        for kind, mine, expected in (
            ("greedy", variant.greedy, variants["eager"].greedy),
            ("drawn", variant.drawn, variants["eager"].drawn),
        ):
            place = next((place for place, pair in enumerate(zip(mine, expected)) if pair[0] != pair[1]), None)
            if place is not None:
                margin = f", whose margin there is {margins[place]:.1e}" if kind == "greedy" else ""
                got = f"got {mine[place]} from {name}, expected {expected[place]} as from eager{margin}"
                promise(False, f"generation: {kind} token {place}: {got}")
        promise(
            variant.logits_difference <= MAX_LOGITS_DIFFERENCE,
            f"generation: logits of {name}: got a difference of {variant.logits_difference:.1e} from eager's, "
            f"expected at most {MAX_LOGITS_DIFFERENCE:g}",
        )
    return min(margins)


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
            tokens == variants["eager"].greedy, f"generation: {name} chose other tokens in timed round {round_ + 1}"
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
                "same",  # or there would be no table
            )
        )
    columns = ("generation", "first call", "tokens/s", "p20 - p80", "x eager", "tokens")
    show_table(columns, rows)
    difference = max(variant.logits_difference for variant in variants.values())
    say(
        f"the logits differ by at most {difference:.1e} (bound {MAX_LOGITS_DIFFERENCE:g}); "
        f"the closest choice had a margin of {margin:.1e}. "
        "First calls compile; stock comes second and finds those kernels built that have the same source as Infuse's."
    )


def _show_text(title: str, prompt: str, written: str) -> None:
    say(f"{title} (the prompt ends at the bar):", style="bold")
    say("\n".join(f"  {line}" for line in f"{prompt}|{written[len(prompt) :]}".rstrip().splitlines()))
