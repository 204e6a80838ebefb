"""What two processes check together; `test_two_processes.py` reports each by its name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from infuse.models.checkpoint import load_sharded_model
from infuse.models.masks import attention_mask, positions
from infuse.models.parallel.pipeline import PipelineEngine
from infuse.models.parallel.process_group import Peers
from infuse.models.shard import Shard, split_layers
from infuse.models.sharded import ShardChain
from tests.models.hugging_face import SIZES

LAYERS = SIZES["num_hidden_layers"]
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


def pipeline(folder: Path, peers: Peers, cut: tuple[int, int]) -> PipelineEngine:
    starts = (0, cut[0])
    shard = Shard("m", starts[peers.rank], starts[peers.rank] + cut[peers.rank] - 1, LAYERS)
    group = torch.distributed.group.WORLD
    assert group is not None
    return PipelineEngine(load_sharded_model(folder, shard, max_generated_tokens=STEPS), group)


def check_shards_in_a_pipeline_equal_one_process(peers: Peers, folder: Path) -> None:
    for family, cut, padding in (("llama", (1, 2), None), ("qwen2_tied", (2, 1), PADDING)):
        got = logits_of(pipeline(folder / family, peers, cut), padding)
        assert_same_bits(peers, got)
        assert_same_logits(got, folder / family, padding)


def check_wrong_arguments_are_an_error_before_anyone_waits(peers: Peers, folder: Path) -> None:
    engine = pipeline(folder / "llama", peers, (1, 2))
    for arguments in (
        {"tokens": torch.zeros(2, 0, dtype=torch.int64)},
        {"tokens": tokens(), "curr_pos": 3},
        {"tokens": tokens(), "mask": torch.ones(2, 1, 8, dtype=torch.bool)},
        {"tokens": tokens(), "input_pos": torch.zeros(3)},
    ):
        assert_refused(lambda arguments=arguments: engine.generate(**arguments), "generate: got")  # type: ignore[misc]
    assert logits_of(engine, None).shape == (2, PROMPT + STEPS, 64)


def check_shards_that_do_not_tile_are_refused_everywhere(peers: Peers, folder: Path) -> None:
    shard = split_layers("m", LAYERS, 2)[0]
    model = load_sharded_model(folder / "llama", shard)
    group = torch.distributed.group.WORLD
    assert group is not None
    assert_refused(lambda: PipelineEngine(model, group), "come twice or out of order")


def check_what_one_rank_raises_all_raise(peers: Peers, folder: Path) -> None:
    def action() -> None:
        if peers.rank == 1:
            raise FileNotFoundError("no such shard")

    assert_refused(lambda: peers.agree(action), "no such shard", FileNotFoundError if peers.rank == 1 else ValueError)


def assert_refused(function: object, words: str, kind: type[Exception] = ValueError) -> None:
    assert callable(function)
    try:
        function()
    except kind as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"expected {kind.__name__} with {words!r}")
