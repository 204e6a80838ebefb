"""Where the decomposition of attention leaves torch's SDPA aside: heads that no flash kernel takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from infuse.lowering.policy import place
from infuse.ops import attention_formulas
from infuse.ops.attention import attention_inline
from infuse.settings import Settings
from tests.tolerances import error


@pytest.mark.parametrize(
    ("head_dim", "round_scores", "written_out"),
    [
        (1024, True, True),
        (264, True, True),
        (256, True, False),  # flash takes it
        (1024, False, False),  # the author called SDPA: its scores were not rounded
    ],
)
def test_wide_heads_are_written_out_on_cuda(
    head_dim: int, round_scores: bool, written_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("_written_out", "attention_sdpa"):
        monkeypatch.setattr(attention_formulas, name, lambda q, *args, name=name: taken.append(name))
    with FakeTensorMode():  # a CUDA tensor without a GPU
        q, k = (torch.empty(1, 1, rows, head_dim, dtype=torch.bfloat16, device="cuda") for rows in (128, 64))
        attention_inline(q, k, k, None, 1.0, round_scores=round_scores)
    assert taken == ["_written_out" if written_out else "attention_sdpa"]


@pytest.mark.parametrize("training", [False, True])
def test_the_report_says_so(training: bool) -> None:
    def kernel(round_scores: bool) -> str:
        with FakeTensorMode():
            q, k = (torch.empty(1, 1, rows, 1024, dtype=torch.bfloat16, device="cuda") for rows in (128, 64))
        args = (q, k, k, None, 1.0, False, 0.0, None, "zeros", 0.0, round_scores)
        return place("attention", args, training, settings=Settings(), max_autotune=False).kernel

    assert kernel(True) == "decomposition (SDPA is slow for heads this wide)"
    assert kernel(False) == "scaled_dot_product_attention"


@pytest.mark.gpu
def test_written_out_it_is_as_near_to_float64_as_sdpa() -> None:
    q, k = (torch.randn(1, 1, rows, 512, device="cuda").bfloat16() / 4 for rows in (300, 40))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), k.double(), scale=1.0)
    sdpa = F.scaled_dot_product_attention(q, k, k, scale=1.0)
    found = attention_inline(q, k, k, None, 1.0, round_scores=True)
    assert error(found, exact) < 3 * error(sdpa, exact)
