"""infuse::rope_out and rope_cache_write_out, the CUDA kernels: every form, configuration, dtype, alignment, layout."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import infuse
from infuse.ops import library, rope_kernels
from infuse.ops.qk_norm_rope import qk_norm_rope_ref
from infuse.ops.rope import rope_bwd_ref, rope_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5
# x, tables
DTYPES = {
    "bf16": (BF16, BF16),
    "bf16, fp32 tables": (BF16, FP32),
    "fp16": (FP16, FP16),
    "fp16, fp32 tables": (FP16, FP32),
    "fp32": (FP32, FP32),
    "fp32, bf16 tables": (FP32, BF16),
    "bf16, fp16 tables": (BF16, FP16),
}
# head_dim, rotary_dim
SIZES = ((128, 128), (64, 64), (80, 32), (96, 96), (256, 64), (72, 72), (20, 6), (512, 512), (1000, 16))
# has_norm, has_weight, fp32 weight, cast_before_weight, weight_offset
NORMS = {
    "norm": (True, False, False, 0.0),
    "norm, offset": (True, False, False, 1.0),
    "norm, cast first": (True, False, True, 0.0),
    "norm, fp32 weight": (True, True, False, 0.0),
    "norm without weight": (False, False, False, 0.0),
}
Flags = tuple[bool, bool, bool, bool]


def configs() -> range:
    """-1, where the launcher chooses, and every configuration."""
    return range(-1, len(library.configurations(rope_kernels.NAME)))


def forms() -> list[Flags]:
    """interleaved, per_pair, inverse, upcast."""
    return list(itertools.product((False, True), repeat=4))  # type: ignore[arg-type]


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def tables(shape: tuple[int, ...], rotary_dim: int, per_pair: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.randn(*shape, rotary_dim // 2 if per_pair else rotary_dim, device="cuda") * 3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    flags: Flags,
    config: int = -1,
    *,
    is_backward: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel's answer, written over NaN."""
    out = torch.empty_like(x) if out is None else out
    out.fill_(float("nan"))
    torch.ops.infuse.rope_out(x, None, cos, sin, None, None, None, 0.0, False, *flags, is_backward, config, out, None)
    return out


def assert_as_good_as_eager(got: Tensor, eager: Tensor, exact: Tensor, scale: Tensor) -> None:
    """The error is at most twice the eager path's largest one in its row plus one unit of the result's dtype.

    scale: the magnitude of the terms that are added; they may cancel, and rounding is relative to them.
    """
    assert got.dtype == eager.dtype and got.shape == eager.shape
    scale = scale + torch.finfo(FP32).tiny
    unit = torch.finfo(got.dtype).eps * (4 if got.dtype == FP32 else 1)
    bound = 2 * ((eager.double() - exact).abs() / scale).amax(-1, keepdim=True) + unit
    error = (got.double() - exact).abs() / scale
    assert bool((error <= bound).all()), f"error {error.max():.3g}, bound {bound.min():.3g}"


def magnitude(x: Tensor, cos: Tensor, sin: Tensor, flags: Flags) -> Tensor:
    """|x1 cos| + |x2 sin|, from the formula over magnitudes."""
    interleaved, per_pair, _, _ = flags
    straight, turned = x.double().abs(), x.double().abs()
    ones, zeros = torch.ones_like(cos.double()), torch.zeros_like(sin.double())
    a = rope_ref(straight, cos.double().abs(), zeros, interleaved, per_pair)
    b = rope_ref(turned, zeros * ones, sin.double().abs(), interleaved, per_pair)
    return a.abs() + b.abs()


def check_rotation(x: Tensor, cos: Tensor, sin: Tensor, flags: Flags, config: int = -1) -> None:
    got = rotate(x, cos, sin, flags, config)
    eager = rope_ref(x, cos, sin, *flags)
    exact = rope_ref(x.double(), cos.double(), sin.double(), *flags)
    assert_as_good_as_eager(got, eager, exact, magnitude(x, cos, sin, flags))
    assert torch.equal(got, rotate(x, cos, sin, flags, config)), "two runs differ"


@pytest.mark.parametrize(("dim", "rotary_dim"), SIZES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_every_form_is_as_good_as_eager(dtypes: tuple[torch.dtype, torch.dtype], dim: int, rotary_dim: int) -> None:
    x = random(2, 7, 5, dim, dtype=dtypes[0])
    before = x.clone()
    for flags in forms():
        check_rotation(x, *tables((7, 1), rotary_dim, flags[1], dtypes[1]), flags)
        check_rotation(x.transpose(1, 2), *tables((2, 1, 7), rotary_dim, flags[1], dtypes[1]), flags)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtypes", ["bf16", "bf16, fp32 tables", "fp16", "fp32"])
def test_every_configuration_is_as_good_as_eager(dtypes: str) -> None:
    x_dtype, table_dtype = DTYPES[dtypes]
    for config, (batch, tokens, heads) in itertools.product(configs(), ((1, 1, 40), (3, 37, 7), (1, 1000, 33))):
        for flags in ((False, False, False, False), (True, True, False, False)):
            x = random(batch, tokens, heads, 128, dtype=x_dtype)
            check_rotation(x, *tables((tokens, 1), 128, flags[1], table_dtype), flags, config)


@pytest.mark.parametrize("dtypes", ["bf16", "bf16, fp32 tables", "fp32"])
def test_backward_is_the_transpose(dtypes: str) -> None:
    x_dtype, table_dtype = DTYPES[dtypes]
    for dim, rotary_dim in ((128, 128), (80, 32), (20, 6)):
        dy = random(2, 5, 3, dim, dtype=x_dtype)
        for flags in forms():
            cos, sin = tables((5, 1), rotary_dim, flags[1], table_dtype)
            got = rotate(dy, cos, sin, flags, is_backward=True)
            exact = rope_bwd_ref(dy.double(), cos.double(), sin.double(), *flags)
            # Not the forward's magnitude: each element meets its partner's sin here.
            scale = dy.double().abs().amax(-1, keepdim=True) * 2
            assert_as_good_as_eager(got, rope_bwd_ref(dy, cos, sin, *flags), exact, scale)


def test_q_and_k_of_a_packed_projection_take_one_launch() -> None:
    packed = random(2, 9, 6 + 2 + 2, 128)
    q, k = packed[:, :, :6], packed[:, :, 6:8]
    cos, sin = tables((9, 1), 128, False, BF16)
    for config in configs():
        q_out, k_out = (torch.full(t.shape, float("nan"), device="cuda", dtype=BF16) for t in (q, k))
        flags = (False, False, False, False)
        torch.ops.infuse.rope_out(q, k, cos, sin, None, None, None, 0.0, False, *flags, False, config, q_out, k_out)
        for x, out in ((q, q_out), (k, k_out)):
            assert torch.equal(out, rotate(x, cos, sin, flags, config, out=torch.empty_like(out)))
            exact = rope_ref(x.double(), cos.double(), sin.double())
            assert_as_good_as_eager(out, rope_ref(x, cos, sin), exact, magnitude(x, cos, sin, flags))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("dtypes", ["bf16", "bf16, fp32 tables", "fp16", "fp32"])
def test_norm_and_rotation_are_as_good_as_eager(dtypes: str, norm: tuple[bool, bool, bool, float]) -> None:
    x_dtype, table_dtype = DTYPES[dtypes]
    has_weight, wide, cast, offset = norm
    for dim, rotary_dim in ((128, 128), (80, 32), (64, 64), (20, 6), (256, 256)):
        weight = 1 + 0.2 * random(dim, dtype=FP32 if wide else x_dtype) if has_weight else None
        x = random(2, 5, 3, dim, dtype=x_dtype) * 3
        for config, flags in itertools.product(configs(), ((False, False, False, False), (True, True, True, True))):
            cos, sin = tables((5, 1), rotary_dim, flags[1], table_dtype)
            out = torch.full_like(x, float("nan"))
            torch.ops.infuse.rope_out(
                x, None, cos, sin, weight, None, EPS, offset, cast, *flags, False, config, out, None
            )
            rest = (None, EPS, False, offset, cast, False, *flags)
            eager = qk_norm_rope_ref(x, cos, sin, weight, *rest)
            wide_weight = None if weight is None else weight.double()
            exact = qk_norm_rope_ref(x.double(), cos.double(), sin.double(), wide_weight, *rest)
            scale = exact.abs().amax(-1, keepdim=True).expand_as(exact)
            assert_as_good_as_eager(out, eager, exact, scale)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_misaligned_tensors_and_tables(dtype: torch.dtype, offset: int) -> None:
    flags = (False, False, False, False)
    cos, sin = tables((5, 1), 64, False, dtype)
    shifted = [torch.empty(t.numel() + offset, device="cuda", dtype=dtype)[offset:].view_as(t) for t in (cos, sin)]
    for table, value in zip(shifted, (cos, sin)):
        table.copy_(value)
    x = torch.empty(5 * 3 * 64 + offset, device="cuda", dtype=dtype)[offset:].view(5, 3, 64).copy_(random(5, 3, 64))
    for config in configs():
        check_rotation(x, cos, sin, flags, config)
        check_rotation(x.clone(), *shifted, flags, config)


def test_factors_side_by_side() -> None:
    """cos and sin of one table [T, R / 2, 2], as torchtune keeps them."""
    both = random(7, 1, 32, 2, dtype=FP32)
    for x, config in itertools.product((random(2, 7, 5, 64), random(2, 7, 5, 64, dtype=FP32)), configs()):
        check_rotation(x, both[..., 0], both[..., 1], (True, True, False, True), config)


def test_output_may_be_strided() -> None:
    storage = torch.full((4, 3, 5, 200), 7.0, device="cuda", dtype=BF16)
    x, (cos, sin) = random(3, 4, 5, 96), tables((4, 1), 96, False, BF16)
    flags = (False, False, False, False)
    for config in configs():
        out = rotate(x, cos, sin, flags, config, out=storage.transpose(0, 1)[..., 8:104])
        assert torch.equal(out, rotate(x, cos, sin, flags, config))
        assert bool((storage[..., :8] == 7).all()) and bool((storage[..., 104:] == 7).all()), "wrote beside the rows"


@pytest.mark.parametrize("shape", [(0, 4, 2, 64), (2, 0, 2, 64), (2, 4, 0, 64)])
def test_empty_tensors_are_left_alone(shape: tuple[int, ...]) -> None:
    cos, sin = tables((shape[1], 1), 64, False, BF16)
    assert rotate(random(*shape), cos, sin, (False, False, False, False)).shape == shape


def test_nan_and_infinity_come_out_as_in_torch() -> None:
    cos, sin = tables((6, 1), 64, False, BF16)
    x = random(6, 3, 80)
    x[0, 0, 3], x[1, 1, 40], x[2, 2, 79] = float("nan"), float("inf"), -float("inf")
    expected = rope_ref(x, cos, sin)
    for config in configs():
        got = rotate(x, cos, sin, (False, False, False, False), config)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


# --- cache writes ----------------------------------------------------------------------------------------------------


def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    caches: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None] | None,
    config: int = -1,
) -> Tensor:
    out = torch.full_like(q, float("nan"))
    norm = (None, None, None) if weights is None else (*weights, EPS)
    torch.ops.infuse.rope_cache_write_out(
        *(q, k, v, cos, sin, cos, sin, positions, positions),
        *(*norm, 0.0, False, False, False, False, False, config, *caches, out),
    )
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3), (4, 1)])
def test_cache_write_is_rotation_and_index_put(dtype: torch.dtype, batch: int, tokens: int) -> None:
    heads, kv_heads, dim, cache_len = 8, 2, 128, 50
    packed = random(batch, tokens, heads + 2 * kv_heads, dim, dtype=dtype).transpose(1, 2)
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=1)
    cos, sin = tables((tokens,), dim, False, dtype)
    weight = (1 + 0.2 * random(dim, dtype=dtype), 1 + 0.2 * random(dim, dtype=dtype))
    for weights, config, wide in itertools.product((None, weight), configs(), (True, False)):
        positions = torch.randperm(cache_len, device="cuda")[:tokens].to(torch.int64 if wide else torch.int32)
        caches = (
            random(batch, kv_heads, cache_len, dim, dtype=dtype),
            random(batch, kv_heads, cache_len, dim, dtype=dtype),
        )
        expected = [cache.clone() for cache in caches]
        out = write(q, k, v, cos, sin, positions, caches, weights, config)
        norm = (None, None, None, 0.0, False) if weights is None else (*weights, EPS, 0.0, False)
        rotated = [torch.full_like(t, float("nan")) for t in (q, k)]
        torch.ops.infuse.rope_out(q, k, cos, sin, *norm, False, False, False, False, False, config, *rotated)
        expected[0][:, :, positions.long()] = rotated[1]
        expected[1][:, :, positions.long()] = v
        assert torch.equal(out, rotated[0])
        assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])


def test_cache_write_in_a_cuda_graph_follows_the_positions() -> None:
    q, k, v = random(1, 8, 1, 64), random(1, 2, 1, 64), random(1, 2, 1, 64)
    cos, sin = tables((1,), 64, False, BF16)
    caches = torch.zeros(1, 2, 16, 64, device="cuda", dtype=BF16), torch.zeros(1, 2, 16, 64, device="cuda", dtype=BF16)
    positions = torch.zeros(1, device="cuda", dtype=torch.int64)
    write(q, k, v, cos, sin, positions, caches, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(q, k, v, cos, sin, positions, caches, None)
        positions.add_(1)
    for _ in range(5):
        graph.replay()
    assert torch.equal(positions, torch.full_like(positions, 5))
    written = caches[1].abs().sum((0, 1, 3)) > 0
    assert written.tolist() == [True] * 5 + [False] * 11
    assert torch.equal(caches[1][:, :, 4:5], v)


def test_layers_in_one_cuda_graph_write_their_own_caches() -> None:
    """Three layers' launches in a row, each into caches of its own; nothing else changes, and q lies in new memory."""
    cos, sin = tables((2,), 64, False, BF16)
    positions = torch.tensor([3, 5], device="cuda")
    inputs = [[random(1, heads, 2, 64) for heads in (8, 2, 2)] for _ in range(3)]
    caches = [(random(1, 2, 16, 64), random(1, 2, 16, 64)) for _ in range(3)]
    expected = [[cache.clone() for cache in pair] for pair in caches]
    unchanged = [[tensor.clone() for tensor in layer] for layer in inputs]
    write(*inputs[0], cos, sin, positions, (torch.empty_like(caches[0][0]), torch.empty_like(caches[0][1])), None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [write(*layer, cos, sin, positions, pair, None) for layer, pair in zip(inputs, caches)]
    graph.replay()
    for (q, k, v), out, pair, right, before in zip(inputs, outs, caches, expected, unchanged):
        right[0][:, :, positions] = rotate(k, cos, sin, (False, False, False, False))
        right[1][:, :, positions] = v
        assert torch.equal(out, rotate(q, cos, sin, (False, False, False, False)))
        assert all(torch.equal(cache, other) for cache, other in zip(pair, right))
        assert all(torch.equal(tensor, other) for tensor, other in zip((q, k, v), before))
        assert out.data_ptr() not in {tensor.data_ptr() for tensor in (q, k, v, *pair)}


# --- compiled --------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Attention with q/k norm over a static cache, as Hugging Face's models decode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(256, (8 + 2 * 2) * 64, bias=False)
        self.out = torch.nn.Linear(512, 256, bias=False)
        self.q_norm, self.k_norm = torch.nn.RMSNorm(64, eps=EPS), torch.nn.RMSNorm(64, eps=EPS)
        self.register_buffer("k_cache", torch.zeros(1, 2, 32, 64))
        self.register_buffer("v_cache", torch.zeros(1, 2, 32, 64))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 64)).split((8, 2, 2), dim=2)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        q, k = (t * cos + torch.cat((-t[..., 32:], t[..., :32]), -1) * sin for t in (q, k))
        self.k_cache.index_copy_(2, positions, k)
        self.v_cache.index_copy_(2, positions, v.transpose(1, 2))
        y = torch.nn.functional.scaled_dot_product_attention(
            q, self.k_cache, self.v_cache, attn_mask=mask, enable_gqa=True
        )
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_layers_decode_as_eager_ones(mode: str | None) -> None:
    layers = torch.nn.Sequential(Layer(), Layer()).cuda().to(BF16)
    eager = copy.deepcopy(layers)
    angles = torch.randn(8, 32, device="cuda")
    tables = torch.cat((angles, angles), -1)

    def step(layers: torch.nn.Sequential, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        cos, sin = tables[position].cos().to(BF16), tables[position].sin().to(BF16)
        for layer in layers:
            x = layer(x, cos, sin, position, mask)
        return x

    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: step(layers, *args), backend="infuse", mode=mode, fullgraph=True)
    with torch.no_grad(), infuse.override(kernels="always"):
        for position in range(8):
            at = torch.tensor([position], device="cuda")
            mask = (torch.arange(32, device="cuda") <= at)[None, None, None]
            x = random(1, 1, 256)
            torch.testing.assert_close(compiled(x, at, mask), step(eager, x, at, mask), rtol=5e-2, atol=5e-2)
    for mine, theirs in zip(layers.buffers(), eager.buffers()):
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-2)
        assert torch.equal(mine[:, :, 8:], torch.zeros_like(mine[:, :, 8:]))
    written = [decision for decision in infuse.last_report().sites if decision.kind == "rope_cache_write"]
    assert len(written) == 2 and all(site.status == "rewritten" for site in written)
