"""Shards of two processes in a pipeline: equal to one process, refused together."""

from __future__ import annotations

from pathlib import Path

import torch

from infuse.models.checkpoint import load_sharded_model
from infuse.models.parallel.pipeline import PipelineEngine
from infuse.models.parallel.process_group import Peers
from infuse.models.shard import Shard, split_layers
from tests.models.hugging_face import SIZES
from tests.models.parallel.engines import (
    PADDING,
    PROMPT,
    STEPS,
    assert_refused,
    assert_same_bits,
    assert_same_logits,
    logits_of,
    tokens,
)

LAYERS = SIZES["num_hidden_layers"]
FAMILIES = ("llama", "qwen2_tied")


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
