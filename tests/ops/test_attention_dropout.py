"""Dropout of infuse::attention: the bits are those of the generator, and the same forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infuse.ops import attention_dropout

OPS = torch.ops.infuse
P = 0.3


def make() -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 4, 5, 8], k and v of two heads and 7 keys, a number that four does not divide."""
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    k, v = (tensor.repeat_interleave(2, 1) for tensor in (k, v))
    return torch.where(kept, (q @ k.mT * 0.4).softmax(-1), 0.0) / (1 - P) @ v


def words(*numbers: int) -> Tensor:
    """Words of 32 bits."""
    return torch.tensor(numbers, dtype=torch.int64)


def test_philox_gives_the_known_answers() -> None:
    """Of the test vectors of Random123."""
    zero, ones = words(0)[0], words(0xFFFFFFFF)[0]
    low = attention_dropout.philox((zero, zero, zero, zero), zero)
    high = attention_dropout.philox((ones, ones, ones, ones), words(-1)[0])
    assert torch.equal(low, words(0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))
    assert torch.equal(high, words(0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD))


def test_every_score_has_a_word_of_its_own() -> None:
    kept = attention_dropout.kept(attention_dropout.draw_seed(torch.device("cpu")), 0.25, (2, 3, 40, 50))
    assert kept.shape == (2, 3, 40, 50)
    assert abs(kept.double().mean() - 0.75) < 0.02
    rows = kept.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)
    assert len(rows.t().unique(dim=0)) == rows.shape[1]


def test_nothing_and_nearly_everything_may_be_dropped() -> None:
    seed = attention_dropout.draw_seed(torch.device("cpu"))
    assert attention_dropout.kept(seed, 0.0, (1, 1, 8, 9)).all()
    assert not attention_dropout.kept(seed, 1.0 - 2**-40, (1, 1, 8, 9)).any()


def test_values_and_gradients_are_those_of_the_kept_probabilities() -> None:
    inputs = make()
    torch.manual_seed(3)
    out = OPS.attention(*inputs, None, 0.4, False, 0.0, None, "none", P)
    torch.manual_seed(3)
    kept = attention_dropout.kept(attention_dropout.draw_seed(torch.device("cpu")), P, (2, 4, 5, 7))
    expected = attend(*inputs, kept)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for got, exact in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout)):
        torch.testing.assert_close(got, exact)


def test_compiled_without_gradients_it_is_random_still() -> None:
    """Two sites with the same inputs draw twice: the operator that draws is not merged with its twin."""
    inputs = [tensor.detach() for tensor in make()]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first = OPS.attention(q, k, v, None, 0.4, False, 0.0, None, "none", P)
        return first, OPS.attention(q, k, v, None, 0.4, False, 0.0, None, "none", P)

    first, second = twice(*inputs)
    assert not torch.equal(first, second)


def test_dropout_needs_a_seed_and_a_probability() -> None:
    q, k, v = make()
    with pytest.raises(ValueError, match=r"seed: got None"):
        OPS.attention_fwd(q, k, v, None, 0.4, False, 0.0, None, "zeros", P)
    with pytest.raises(ValueError, match=r"dropout_p: got 1.0"):
        OPS.attention_fwd(q, k, v, None, 0.4, False, 0.0, None, "zeros", 1.0, attention_dropout.draw_seed(q.device))
