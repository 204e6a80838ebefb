"""The same texts through an engine over processes and through one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from infuse.models.checkpoint import load_sharded_model
from infuse.models.masks import attention_mask, positions
from infuse.models.parallel.pipeline import PipelineEngine
from infuse.models.parallel.process_group import Peers
from infuse.models.sharded import ShardChain

PROMPT, STEPS = 5, 3
PADDING = torch.tensor([0, 2])


def tokens() -> Tensor:
    return torch.randint(64, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))


def logits_of(engine: ShardChain | PipelineEngine, padding: Tensor | None) -> Tensor:
    """[B, S, V]: a prompt in one call, then a token a call."""
    text, found = tokens(), []
    window = engine.models[0].config.sliding_window
    for end in range(PROMPT, PROMPT + STEPS + 1):
        start = end - 1 if end > PROMPT else 0
        mask = place = None
        if padding is not None:
            mask = attention_mask(start, end - start, end, padding=padding, window=window)
            place = positions(start, end - start, padding=padding)
        found.append(engine.generate(text[:, start:end], mask, place, curr_pos=start))
    return torch.cat(found, 1)


def assert_same_logits(got: Tensor, folder: Path, padding: Tensor | None = None) -> None:
    """As one process with all layers has them, within fp32: sums of up to 96 terms, split in two and in another order,
    in three layers, on logits of about 1 to 5."""
    whole = ShardChain([load_sharded_model(folder, max_generated_tokens=STEPS)])
    torch.testing.assert_close(got, logits_of(whole, padding), atol=2e-5, rtol=2e-5)


def assert_same_bits(peers: Peers, tensor: Tensor) -> None:
    held = [torch.empty_like(tensor) for _ in range(peers.world_size)]
    torch.distributed.all_gather(held, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in held)


def assert_refused(function: object, words: str, kind: type[Exception] = ValueError) -> None:
    assert callable(function)
    try:
        function()
    except kind as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"expected {kind.__name__} with {words!r}")
