"""On a GPU: the components compiled in half precision, and use_cuda_kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from infuse import backend
from infuse.models.mahia import DynamicNeuroFabric, HybridEfficientModel, MetaAttentionKernel
from tests.models.mahia.components import CASES, COMPILED, Together, assert_compiled_trains_right
from tests.tolerances import assert_close_to_fp64

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_training_in_half_precision_is_as_near_to_float64_as_eager(dtype: torch.dtype) -> None:
    cases = [CASES[name] for name in COMPILED]
    model = Together(cases).to("cuda", dtype)
    inputs = [
        tuple(value.detach().cuda().requires_grad_(value.is_floating_point()) for value in case.inputs(dtype))
        for case in cases
    ]
    # Sums of few numbers that nearly cancel: eager's own error is then luck.
    assert_compiled_trains_right(model, inputs, factor=4.0)


def test_use_cuda_kernels_compiles_the_module_with_infuse() -> None:
    plain = MetaAttentionKernel(128).to("cuda", torch.bfloat16)
    fused = MetaAttentionKernel(128, use_cuda_kernels=True).to("cuda", torch.bfloat16)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 300, 128, device="cuda").bfloat16()
    records: list[Any] = []
    stop = backend.on_rewrite(records.extend)
    try:
        with torch.no_grad():
            assert_close_to_fp64(fused(x), plain(x), copy.deepcopy(plain).double()(x.double()))
    finally:
        stop()
    assert sorted(record.kind for record in records if record.status == "rewritten") == ["attention", "rms_norm"]


def test_use_cuda_kernels_trains() -> None:
    fused = DynamicNeuroFabric(64, 2, use_cuda_kernels=True).to("cuda", torch.bfloat16)
    fused(torch.randn(8, 64, device="cuda").bfloat16()).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


def test_the_classifier_hands_it_on() -> None:
    model = HybridEfficientModel(20, 9, 7, 64, use_cuda_kernels=True).to("cuda", torch.bfloat16)
    out = model(torch.randint(20, (2, 9), device="cuda"), torch.randn(2, 7, device="cuda").bfloat16())
    assert out.shape == (2, 2) and out.isfinite().all()
