"""Every attention, norm, rotary embedding and gate of a sharded decoder is fused, with caches and without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from infuse.testing import assert_rewrites
from tests.models.configs import CONFIG

pytest.importorskip("torchtune")

from infuse.models.masks import attention_mask
from infuse.models.shard import split_layers
from infuse.models.sharded import ShardedGeneralModel

FAMILIES = [{}, {"rope_scaling_factor": 8.0}, {"model_type": "qwen2"}, {"sliding_window": 4}]


def sites(num_layers: int, *, last: bool) -> dict[str, int]:
    """The first norm has no residual before it; each other one has, the last shard's final norm included."""
    return {
        "attention": num_layers,
        "rope": 2 * num_layers,
        "swiglu": num_layers,
        "rms_norm": 1,
        "add_rms_norm": 2 * num_layers - 1 + last,
    }


@torch.no_grad()
@pytest.mark.parametrize("change", FAMILIES, ids=str)
def test_a_step_with_caches_and_padding_is_fused(change: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **change)
    first = ShardedGeneralModel(config, split_layers("m", 3, 2)[0], max_generated_tokens=8)
    first.generate(torch.zeros(2, 5, dtype=torch.int64))
    mask = attention_mask(5, 1, 13, padding=torch.tensor([0, 2]), window=config.sliding_window)
    step = {"mask": mask, "input_pos": torch.tensor([[5], [3]])}
    assert_rewrites(
        first.model, (torch.zeros(2, 1, dtype=torch.int64),), kwargs=step, expect=sites(2, last=False), refused={}
    )


@torch.no_grad()
@pytest.mark.parametrize("change", FAMILIES, ids=str)
def test_a_later_shard_without_caches_is_fused(change: dict[str, Any]) -> None:
    last = ShardedGeneralModel(dataclasses.replace(CONFIG, **change), split_layers("m", 3, 2)[1], use_cache=False)
    hidden = torch.zeros(2, 16, CONFIG.embed_dim)
    assert_rewrites(last.model, (hidden,), expect=sites(1, last=True), refused={})
