"""Texts of several lengths in one batch: each gives what it gives alone, whatever stands in the padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from infuse import testing
from infuse.models.mahia import HybridEfficientModel, HyenaBlock, MetaAttentionKernel, SparseMoETopK, TextEncoder
from tests.tolerances import error

DIM, LENGTH, LENGTHS = 8, 70, (70, 33, 1)  # the state's chunks have 64 rows
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: MetaAttentionKernel(DIM, num_heads=2),
    "hyena": lambda: HyenaBlock(DIM, 5),
    "hyena with attention": lambda: HyenaBlock(DIM, 5, use_attention=True),
    "experts with room": lambda: SparseMoETopK(DIM, 4, 2, capacity_factor=4.0),
}
each_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
each_side = pytest.mark.parametrize("left", [False, True], ids=["behind", "before"])


def mask_of(left: bool, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """Bool [B, L]."""
    marks = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    return marks.flip(1) if left else marks


def tokens_of(mask: Tensor) -> Tensor:
    """With other tokens than the text's in the padding."""
    return torch.randint(10, mask.shape).where(mask, torch.randint(10, 20, mask.shape))


def hybrid(**settings: float) -> HybridEfficientModel:
    return HybridEfficientModel(20, LENGTH, 7, DIM, num_classes=3, memory_size=6, kernel_size=5, **settings).double()  # type: ignore[arg-type]


@each_block
@each_side
def test_a_block_gives_each_sequence_what_it_gives_alone(make: Callable[[], nn.Module], left: bool) -> None:
    block, mask = make().double(), mask_of(left)
    x = torch.randn(3, LENGTH, DIM, dtype=torch.float64).where(mask.unsqueeze(-1), 100.0)
    out = block(x, mask)
    for row, marks, found in zip(x, mask, out):
        assert error(found[marks], block(row[marks].unsqueeze(0))[0]) < 1e-12


@each_block
def test_padding_gets_no_gradient_and_gives_none(make: Callable[[], nn.Module]) -> None:
    block, mask = make().double(), mask_of(False)
    x = torch.randn(3, LENGTH, DIM, dtype=torch.float64).requires_grad_()
    block(x, mask)[mask].sum().backward()
    assert x.grad is not None
    assert not x.grad[~mask].any() and x.grad[mask].any(-1).all()


@each_side
def test_text_and_classifier_give_each_text_what_it_gives_alone(left: bool) -> None:
    model, mask = hybrid(capacity_factor=4.0), mask_of(left)
    assert isinstance(model.text, TextEncoder)
    tokens, features = tokens_of(mask), torch.randn(3, 7, dtype=torch.float64)
    encoded, logits = model.text(tokens, mask), model(tokens, features, mask)
    for index, marks in enumerate(mask):
        alone = tokens[index : index + 1, marks]
        assert error(encoded[index, marks], model.text(alone)[0]) < 1e-12
        assert error(logits[index], model(alone, features[index : index + 1])[0]) < 1e-12
    model.update_memory(tokens, features, mask)
    assert error(model.memory.cache[0], model.embed(tokens, features, mask).mean(0)) < 1e-12


def test_full_experts_leave_out_the_same_rows_with_padding() -> None:
    experts = SparseMoETopK(DIM, 4, 2, capacity_factor=0.5).double()
    mask = mask_of(True, (33,))
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    alone = experts(x[:, mask[0]])
    assert (alone == 0).all(-1).any() and (alone != 0).any()
    out = experts(x, mask)
    assert error(out[:, mask[0]], alone) < 1e-12
    assert not out[~mask].any()
    torch.testing.assert_close(experts.balance_loss(x, mask), experts.balance_loss(x[:, mask[0]]))


def test_an_empty_text_is_no_accident() -> None:
    model, mask = hybrid(), mask_of(False, (70, 0, 5))
    out = model(tokens_of(mask), torch.randn(3, 7, dtype=torch.float64), mask)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("dtype", "training"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_the_sites_are_the_same_with_a_mask(dtype: torch.dtype, training: bool) -> None:
    model, mask = hybrid().to(dtype), mask_of(False)
    inputs = (tokens_of(mask), torch.randn(3, 7, dtype=dtype), mask)
    # One more sum in front of a norm than without a mask: of embeddings and positions, which differ from text to text.
    expected = {"rms_norm": 1, "swiglu": 6, "add_rms_norm": 7, "attention": 3}
    testing.assert_rewrites(model, inputs, expect=expected, refused={}, training=training)


@pytest.mark.parametrize("mask", [torch.ones(3, 9, dtype=torch.int64), torch.ones(3, 8, dtype=torch.bool)], ids=str)
def test_other_masks_are_refused(mask: Tensor) -> None:
    tokens, x = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, DIM)
    message = r"mask: got .*, expected torch.bool of shape \(3, 9\), true where a row is no padding"
    for module, value in ((TextEncoder(20, 9, DIM), tokens), *((make(), x) for make in BLOCKS.values())):
        with pytest.raises(ValueError, match=message):
            module(value, mask)
