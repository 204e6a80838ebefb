"""infuse::qk_norm_rope_bwd and its pair, the CUDA kernel: every form, dtype, size and layout against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import infuse
from infuse.ops import qk_norm_rope_bwd as op

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5
# x, tables, weight
DTYPES = {
    "bf16": (BF16, BF16, BF16),
    "bf16, fp32 tables": (BF16, FP32, BF16),
    "bf16, fp32 weight": (BF16, BF16, FP32),
    "fp16": (FP16, FP16, FP16),
    "fp32": (FP32, FP32, FP32),
}
# head_dim, rotary_dim; the last three have no kernel
SIZES = ((128, 128), (64, 64), (80, 32), (96, 96), (256, 64), (512, 512), (72, 72), (20, 6), (1000, 16))
Flags = tuple[bool, bool, bool, bool]
PLAIN: Flags = (False, False, False, False)
FORMS: list[Flags] = [(*flags, False) for flags in itertools.product((False, True), repeat=3)]  # type: ignore[misc]


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def tables(tokens: int, rotary_dim: int, per_pair: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, 1, rotary_dim // 2 if per_pair else rotary_dim, device="cuda") * 3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check(
    dy: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    flags: Flags = PLAIN,
    offset: float = 0.0,
    got: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The kernel's gradients, twice the same, against fp64."""
    rest = (EPS, offset, False, *flags)
    if got is None:
        got = torch.ops.infuse.qk_norm_rope_bwd(dy, x, cos, sin, weight, *rest)
        again = torch.ops.infuse.qk_norm_rope_bwd(dy, x, cos, sin, weight, *rest)
        assert all(torch.equal(a, b) for a, b in zip(got, again)), "two runs differ"
    wide = None if weight is None else weight.double()
    exact = op.qk_norm_rope_bwd_ref(dy.double(), x.double(), cos.double(), sin.double(), wide, *rest)
    assert got[0].stride() == torch.empty_like(x).stride() and got[0].dtype == x.dtype
    # dx is a difference of terms as large as the row's largest: one rounding of the result, fp32 sums before it.
    scale = exact[0].abs() + 1e-3 * exact[0].abs().amax(-1, keepdim=True)
    unit = torch.finfo(x.dtype).eps * (16 if x.dtype == FP32 else 1)
    error = (got[0].double() - exact[0]).abs() / scale.clamp_min(torch.finfo(FP32).tiny)
    assert not error.numel() or float(error.max()) <= unit + 1e-3 * (x.dtype == FP32), f"dx: {error.max():.3g}"
    if weight is None:
        assert got[1].shape == (0,)
        return
    magnitude = (
        op.qk_norm_rope_bwd_ref(dy.double().abs(), x.double(), cos.double().abs(), sin.double().abs(), wide, *rest)[
            1
        ].abs()
        + exact[1].abs()
    )
    error = (got[1].double() - exact[1]).abs()
    bound = torch.finfo(weight.dtype).eps * exact[1].abs() + 1e-5 * (magnitude.amax() + dy.shape.numel() ** 0.5)
    assert bool((error <= bound).all()), f"dweight: {(error / bound).max():.3g} of what is allowed"


@pytest.mark.parametrize(("dim", "rotary_dim"), SIZES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_every_form_against_fp64(dtypes: tuple[torch.dtype, ...], dim: int, rotary_dim: int) -> None:
    x_dtype, table_dtype, weight_dtype = dtypes
    dy, x = (random(2, 7, 5, dim, dtype=x_dtype) for _ in range(2))
    before = dy.clone(), x.clone()
    weight = 1 + 0.2 * random(dim, dtype=weight_dtype)
    for flags in FORMS:
        cos, sin = tables(7, rotary_dim, flags[1], table_dtype)
        check(dy, x, cos, sin, weight, flags)
        check(dy, x, cos, sin, weight, flags, offset=1.0)
        check(dy, x, cos, sin, None, flags)
        heads_first = (t.transpose(1, 2) for t in (dy, x))
        check(*heads_first, cos.transpose(0, 1), sin.transpose(0, 1), weight, flags)
    assert torch.equal(dy, before[0]) and torch.equal(x, before[1])


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (1, 1, 40), (3, 37, 7), (1, 1000, 33), (2, 4099, 9)])
def test_any_number_of_rows(batch: int, tokens: int, heads: int) -> None:
    dy, x = random(batch, tokens, heads, 128), random(batch, tokens, heads, 128)
    check(dy, x, *tables(tokens, 128, False, BF16), 1 + 0.2 * random(128))


def test_gradients_and_inputs_may_lie_in_different_orders() -> None:
    packed, (cos, sin) = random(2, 9, 6 + 2 + 2, 128), tables(9, 128, False, BF16)
    x = packed[:, :, :6].transpose(1, 2)
    cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    for dy in (random(2, 6, 9, 128), random(2, 9, 6, 128).transpose(1, 2), random(2, 6, 9, 256)[..., 8:136]):
        check(dy, x, cos, sin, 1 + 0.2 * random(128))
    expanded = random(2, 1, 9, 128).expand(2, 6, 9, 128)
    check(expanded, x, cos, sin, 1 + 0.2 * random(128))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_misaligned_tensors_fall_back(dtype: torch.dtype) -> None:
    weight, (cos, sin) = 1 + 0.2 * random(64, dtype=dtype), tables(5, 64, False, dtype)
    x, dy = random(5, 3, 64, dtype=dtype), random(5, 3, 64, dtype=dtype)

    def shifted(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(tensor).copy_(tensor)

    check(shifted(dy), x, cos, sin, weight)
    check(dy, shifted(x), cos, sin, weight)
    check(dy, x, shifted(cos), shifted(sin), weight)
    check(dy, x, cos, sin, shifted(weight))
    check(dy, random(5, 3, 65, dtype=dtype)[..., :64], cos, sin, weight)


def test_tables_side_by_side() -> None:
    both = random(7, 1, 32, 2, dtype=FP32)
    dy, x = random(2, 7, 5, 64), random(2, 7, 5, 64)
    check(dy, x, both[..., 0], both[..., 1], 1 + 0.2 * random(64), (True, True, False, True))
    twice = random(7, 1, 64, 2, dtype=FP32)
    check(dy, x, twice[..., 0], twice[..., 1], 1 + 0.2 * random(64), (True, False, False, True))


@pytest.mark.parametrize("shape", [(0, 4, 2, 64), (2, 0, 2, 64), (2, 4, 0, 64)])
def test_no_rows_have_no_gradient(shape: tuple[int, ...]) -> None:
    cos, sin = tables(shape[1], 64, False, BF16)
    x, weight = random(*shape), random(64)
    dx, dweight = torch.ops.infuse.qk_norm_rope_bwd(x, x, cos, sin, weight, EPS, 0.0, False, *PLAIN)
    assert dx.shape == shape and torch.equal(dweight, torch.zeros_like(weight))


def test_nan_and_infinity_stay_in_their_rows() -> None:
    dy, x, weight = random(6, 3, 128), random(6, 3, 128), 1 + 0.2 * random(128)
    cos, sin = tables(6, 128, False, BF16)
    x[0, 0, 3], x[1, 1, 40], dy[2, 2, 100] = float("nan"), float("inf"), -float("inf")
    args = (cos, sin, weight, EPS, 0.0, False, *PLAIN)
    dx, dweight = torch.ops.infuse.qk_norm_rope_bwd(dy, x, *args)
    expected, expected_dweight = op.qk_norm_rope_bwd_ref(dy, x, *args)
    assert torch.equal(dx.isfinite(), expected.isfinite())
    assert torch.equal(dweight.isfinite(), expected_dweight.isfinite())


@pytest.mark.parametrize("dtypes", ["bf16", "bf16, fp32 weight", "fp32"])
def test_q_and_k_take_one_launch(dtypes: str) -> None:
    x_dtype, table_dtype, weight_dtype = DTYPES[dtypes]
    packed, grads = random(2, 65, 12, 128, dtype=x_dtype), random(2, 65, 10, 128, dtype=x_dtype)
    (q, k), (dq, dk) = (t.split((8, 2), dim=2) for t in (packed[:, :, :10], grads))
    cos, sin = tables(65, 128, False, table_dtype)
    weights = [1 + 0.2 * random(128, dtype=weight_dtype) for _ in range(2)]
    found = torch.ops.infuse.qk_norm_rope_pair_bwd(dq, q, dk, k, cos, sin, *weights, EPS, 0.0, False, *PLAIN)
    check(dq, q, cos, sin, weights[0], got=found[:2])
    check(dk, k, cos, sin, weights[1], got=found[2:])
    none = torch.ops.infuse.qk_norm_rope_pair_bwd(dq, q, dk, k, cos, sin, None, None, EPS, 0.0, False, *PLAIN)
    check(dk, k, cos, sin, None, got=none[2:])
    mixed = torch.ops.infuse.qk_norm_rope_pair_bwd(dq, q, dk, k, cos, sin, None, weights[1], EPS, 0.0, False, *PLAIN)
    check(dk, k, cos, sin, weights[1], got=mixed[2:])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def attention(x: Tensor, q_matrix: Tensor, kv_matrix: Tensor, *rest: Tensor) -> Tensor:
    """x [batch, tokens, 256]; 8 heads of q and 2 of k and v, as transformers' Qwen3 has them."""
    q_weight, k_weight, cos, sin = rest
    q = norm((x @ q_matrix).unflatten(-1, (8, 64)), q_weight).transpose(1, 2)
    k, v = (x @ kv_matrix).unflatten(-1, (4, 64)).transpose(1, 2).chunk(2, dim=1)
    k = norm(k, k_weight)
    q, k = (t * cos + torch.cat((-t[..., 32:], t[..., :32]), -1) * sin for t in (q, k))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("kernels", ["always", "auto"])
def test_compiled_training_is_as_good_as_stock_and_saves_no_more(kernels: str) -> None:
    torch.manual_seed(0)
    angles = torch.randn(1, 1, 512, 32, device="cuda").repeat(1, 1, 1, 2)
    args = [
        *(random(2, 512, 256), random(256, 512) / 16, random(256, 256) / 16),
        *(1 + 0.2 * random(64), 1 + 0.2 * random(64), angles.cos().to(BF16), angles.sin().to(BF16)),
    ]
    trained = [arg.requires_grad_() for arg in args[:5]]
    dy = random(2, 8, 512, 64)

    def gradients(function: object, given: list[Tensor], dy: Tensor) -> tuple[tuple[Tensor, ...], int]:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(*given)  # type: ignore[operator]
        return torch.autograd.grad(out, given[:5], dy), sum(saved.values())

    wide = [arg.detach().double().requires_grad_() for arg in args]
    exact, _ = gradients(attention, wide, dy.double())
    torch._dynamo.reset()
    stock, stock_bytes = gradients(torch.compile(attention), args, dy)
    torch._dynamo.reset()
    with infuse.override(kernels=kernels):
        mine, my_bytes = gradients(torch.compile(attention, backend="infuse"), args, dy)
    assert my_bytes <= stock_bytes
    for got, theirs, right in zip(mine, stock, exact):
        worst = (theirs.double() - right).norm() / right.norm()
        assert (got.double() - right).norm() / right.norm() <= 1.2 * worst + torch.finfo(BF16).eps
    del trained
