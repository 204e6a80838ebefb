"""Which tokens are chosen, and how often."""

from __future__ import annotations

import pytest
import torch

from infuse.models.sampling import Sampling, choose

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(2.0, top_k=1), Sampling(0.0, top_k=3)])
def test_the_likeliest_token_is_taken(sampling: Sampling) -> None:
    assert choose(torch.stack([LOGITS, -LOGITS]), sampling).tolist() == [1, 0]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (2.0, None), (0.5, 3), (1.0, 2), (1.0, 99)])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float, top_k: int | None) -> None:
    draws = 40_000
    generator = torch.Generator().manual_seed(0)
    got = choose(LOGITS.expand(draws, 4), Sampling(temperature, top_k), generator).bincount(minlength=4) / draws
    kept = LOGITS.sort(descending=True).values[min(top_k or 4, 4) - 1] <= LOGITS
    expected = torch.softmax((LOGITS / temperature).masked_fill(~kept, -torch.inf), -1)
    assert (got[~kept] == 0).all()
    torch.testing.assert_close(got, expected, atol=4 * 0.5 / draws**0.5, rtol=0)  # four standard deviations


@pytest.mark.parametrize(("temperature", "top_k"), [(-1.0, None), (float("nan"), None), (float("inf"), 2), (1.0, 0)])
def test_values_out_of_range_are_refused(temperature: float, top_k: int | None) -> None:
    with pytest.raises(ValueError, match="sampling: got (temperature|top_k)="):
        Sampling(temperature, top_k)
