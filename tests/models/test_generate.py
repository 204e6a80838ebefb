"""Generation over the KV cache: what it writes is what the decoder without a cache would write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from infuse.models.generate import decode_step, generate, set_up_cache
from infuse.models.llama import TINY, torchtune_llama3

pytest.importorskip("torchtune")
LENGTH = 24


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return torchtune_llama3(TINY).eval()


@pytest.fixture(scope="module")
def cached() -> nn.Module:
    return set_up_cache(torchtune_llama3(TINY), batch_size=2, length=LENGTH)


def prompt(length: int = 5) -> Tensor:
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def greedy_without_cache(model: nn.Module, tokens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    kept = []
    for _ in range(num_tokens):
        kept.append(model(tokens)[:, -1])
        tokens = torch.cat([tokens, kept[-1].argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(kept, 1)


@pytest.mark.parametrize("length", [1, 5])
def test_greedy_tokens_and_logits_equal_the_full_forward(plain: nn.Module, cached: nn.Module, length: int) -> None:
    tokens, logits = greedy_without_cache(plain, prompt(length), LENGTH - length)
    got = generate(cached, decode_step(cached), prompt(length), LENGTH - length, keep_logits=True)
    assert torch.equal(got.tokens, tokens)
    assert got.logits is not None
    # Another order of summation in fp32, on logits of about 1.
    torch.testing.assert_close(got.logits, logits, atol=1e-5, rtol=1e-5)


def test_a_second_text_does_not_see_the_first_ones_cache(cached: nn.Module) -> None:
    first = generate(cached, decode_step(cached), prompt(), 10)
    generate(cached, decode_step(cached), 255 - prompt(), 19)
    assert torch.equal(generate(cached, decode_step(cached), prompt(), 10).tokens, first.tokens)


def test_every_step_has_the_same_shapes_and_the_mask_grows(cached: nn.Module) -> None:
    seen = []

    def step(tokens: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        seen.append((tuple(tokens.shape), tuple(mask.shape), mask.sum(-1).flatten().tolist(), input_pos.tolist()))
        return torch.zeros(2, 1, 256)

    generate(cached, step, prompt(3), 2)
    assert seen == [((2, 1), (2, 1, LENGTH), [n, n], [n - 1]) for n in range(1, 5)]


def test_sampling_draws_from_the_top_k_and_follows_from_the_seed(cached: nn.Module) -> None:
    def step(tokens: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        return torch.arange(256.0).expand(2, 1, 256)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate(cached, step, prompt(1), 20, top_k=3, temperature=2.0, generator=generator).tokens

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert set(draw(0)[:, 1:].flatten().tolist()) == {253, 254, 255}


@pytest.mark.parametrize(
    ("length", "num_tokens", "options", "message"),
    [
        (5, LENGTH, {}, f"this one holds {LENGTH}"),
        (0, 1, {}, "got 0 prompt tokens"),
        (5, 1, {"top_k": 0}, "top_k=0"),
        (5, 1, {"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_what_can_not_be_generated_is_refused(
    cached: nn.Module, length: int, num_tokens: int, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(cached, decode_step(cached), prompt(length), num_tokens, **options)  # type: ignore[arg-type]


def test_a_model_without_cache_is_refused(plain: nn.Module) -> None:
    with pytest.raises(ValueError, match="this one holds None"):
        generate(plain, decode_step(plain), prompt(), 1)
