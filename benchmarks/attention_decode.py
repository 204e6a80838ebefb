"""Attention of one to sixteen query rows over a static KV cache, 32 query and 8 K/V heads of 128.

    python benchmarks/attention_decode.py [--quick] [--cases REGEX] [--impl REGEX] [--output DIR] [--list]

The mask is bool [batch, 1, queries, keys] and says which keys of the cache are valid. The floor is the bytes of the
valid keys and values: an H200 reads 4.3 TB/s, so a batch of 1 with 1k, 4k and 32k keys takes 1.0, 3.9 and 31 us, a
batch of 16 and of 64 with 4k keys 63 and 250 us. Stock's SDPA reads the whole cache, torchtune's code expands K and V
for the groups of heads first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from command import main
from harness import Case, Device, Function, Impl, compiled, compiled_pairs, eager
from implementations import NO_CUDAGRAPHS
from norms import random
from rope import require_kernels
from torch import Tensor
from torch.nn import functional as F

MODES = (("", None), ("-max-autotune", NO_CUDAGRAPHS))


@dataclass(frozen=True, slots=True)
class Shape:
    """`keys` places in the cache, of which `valid` are filled."""

    batch: int
    queries: int
    keys: int
    valid: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        filled = "" if self.valid == self.keys else f", {self.valid} valid"
        heads = "" if self.head_dim == 128 else f" {self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"b{self.batch}{heads} {self.queries} queries {self.keys} keys{filled}"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same where all keys are valid and there is one query."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def attend_expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As torchtune writes it."""
    groups = q.shape[1] // k.shape[1]
    k, v = (kv.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(kv.shape[0], -1, *kv.shape[2:]) for kv in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The definition, for the reference."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.repeat_interleave(groups, 1)


def kernel(config: int = -1, splits: int = 0) -> Function:
    """The raw kernel, with no compiler around it."""
    require_kernels()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        scale = q.shape[-1] ** -0.5
        torch.ops.infuse.attention_decode_out(q, k, v, mask, scale, False, 0.0, None, False, config, splits, out)
        return out

    return run


def case(shape: Shape, dtype: torch.dtype, *, on_gpu: bool) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        q = random(g, dtype, shape.batch, shape.queries, shape.heads, shape.head_dim).transpose(1, 2)
        k, v = (random(g, dtype, shape.batch, shape.kv_heads, shape.keys, shape.head_dim) for _ in range(2))
        last = torch.arange(shape.queries, device=g.device)[:, None] + shape.valid - shape.queries
        mask = torch.arange(shape.keys, device=g.device)[None] <= last
        return q, k, v, mask.expand(shape.batch, 1, -1, -1).contiguous()

    impls = [eager(attend), *compiled_pairs(attend, *MODES)]
    impls += [
        compiled(attend_expanded, "compile-expanded"),
        compiled(attend_expanded, "infuse-expanded", backend="infuse"),
    ]
    if shape.queries == 1 and shape.valid == shape.keys:
        impls.append(eager(attend_to_all, "sdpa-no-mask"))
    if on_gpu:
        impls.append(Impl("infuse-kernel", kernel))
    rows = shape.batch * shape.queries
    return Case(
        name=f"decode {shape}",
        inputs=inputs,
        eager=attend_expanded,
        reference=attend_written_out,
        impls=impls,
        bytes=2 * dtype.itemsize * shape.head_dim * (shape.batch * shape.kv_heads * shape.valid + rows * shape.heads),
        flops=4 * rows * shape.heads * shape.valid * shape.head_dim,
        dtype=dtype,
    )


def cases(device: Device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if quick or not on_gpu:
        small = {"heads": 4, "kv_heads": 2, "head_dim": 32}
        shapes = [Shape(2, 1, 64, 64, **small), Shape(2, 3, 96, 48, **small)]
    else:
        shapes = [Shape(1, 1, keys, keys) for keys in (1024, 4096, 32768)]
        shapes += [
            Shape(1, 1, 32768, 1024),
            Shape(4, 1, 4096, 4096),
            Shape(16, 1, 4096, 4096),
            Shape(64, 1, 4096, 4096),
            Shape(64, 1, 4096, 2048),
            Shape(4, 1, 16384, 16384),
            Shape(8, 1, 8192, 4096),
        ]
        shapes += [Shape(batch, 1, 12288, 12288, heads=24, kv_heads=3, head_dim=64) for batch in (8, 48)]
        shapes += [Shape(8, queries, 8192, 8192) for queries in (2, 4, 8, 16)]
        shapes += [Shape(1, queries, 2048, 2048) for queries in (2, 8, 16)]
    for shape in shapes:
        yield case(shape, dtype, on_gpu=on_gpu)


if __name__ == "__main__":
    raise SystemExit(main("attention_decode", __doc__, cases))
