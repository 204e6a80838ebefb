"""Masks and positions of left-padded batches, slot by slot."""

from __future__ import annotations

import pytest
import torch

from infuse.models.masks import attention_mask, pad_left, positions


def test_without_padding_the_mask_is_causal_over_the_slots() -> None:
    expected = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal(attention_mask(0, 5, 5), expected[None])
    step = attention_mask(3, 1, 6)
    assert step.tolist() == [[[True, True, True, True, False, False]]]


def test_a_window_counts_the_token_itself() -> None:
    assert attention_mask(4, 1, 6, window=2).tolist() == [[[False, False, False, True, True, False]]]
    assert torch.equal(attention_mask(0, 4, 4, window=1), torch.eye(4, dtype=torch.bool)[None])


def test_padding_is_seen_by_itself_alone() -> None:
    mask = attention_mask(0, 3, 4, padding=torch.tensor([0, 2]))
    assert torch.equal(mask[0], torch.ones(3, 4, dtype=torch.bool).tril())
    assert mask[1].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert attention_mask(3, 1, 4, padding=torch.tensor([2])).int().tolist() == [[[0, 0, 1, 1]]]


def test_positions_count_a_rows_own_tokens() -> None:
    padding = torch.tensor([0, 2])
    assert positions(0, 4, padding=padding).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert positions(4, 1, padding=padding).tolist() == [[4], [2]]
    assert positions(4, 2).tolist() == [[4, 5]]


def test_prompts_are_padded_on_the_left() -> None:
    tokens, padding = pad_left([[5, 6, 7], [8]], pad_id=9)
    assert tokens.tolist() == [[5, 6, 7], [9, 9, 8]] and tokens.dtype == torch.int64
    assert padding.tolist() == [0, 2]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 in each prompt"):
        pad_left(prompts)
