"""Linear + cross entropy on CUDA, a chunk of rows at a time: products by torch, the rest by csrc/cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from infuse.ops import cross_entropy_kernels, library

# Rows of a chunk, at least, where there are as many. Each chunk but the first reads and writes the weight's gradient
# once more. On an H200 with 8192 rows, D 4096 and V 128256 forward and backward take 0.96 of the time of torch.compile
# with chunks of 4096 rows, 0.99 to 1.00 with 2048, 1.03 with 1024. Short rows of x are cheap to multiply, so that the
# passes over the logits count for more: with D 896 and V 151936 it is 0.92 with 1024.
CHUNK_ROWS = 2048
SHORT_CHUNK_ROWS = 1024  # for those, and where the weight's gradient is not needed
_SHORT_DIM = 1024
_ROW_MULTIPLE = 128  # of a product's tiles


def cannot_run(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why these cannot be taken in chunks, "" if they can. Reads devices, shapes and dtypes only."""
    if x.dtype not in cross_entropy_kernels.DTYPES:
        return f"no cross entropy kernel for {x.dtype}"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "weight and bias have another dtype than x"
    return library.missing(x.device)


def chunk_rows(rows: int, dim: int, need_dweight: bool) -> int:
    """Rows of a chunk: all where their logits take no more memory than the weight's gradient, which then is written
    once; otherwise equal shares, which are not much too small."""
    if need_dweight and rows <= dim:
        return rows
    least = CHUNK_ROWS if need_dweight and dim > _SHORT_DIM else SHORT_CHUNK_ROWS
    share = -(-rows // max(1, (rows + least // 8) // least))
    return min(rows, -(-share // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    is_mean: bool,
    label_smoothing: float,
    softcap: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss in float32, and the gradients that are needed, in their tensors' dtypes (empty otherwise).

    x [R, D], weight [V, D], bias [V] or None, target [R].
    """
    rows, vocab, target = x.shape[0], weight.shape[0], target.contiguous()
    losses = x.new_empty(rows, dtype=torch.float32)
    scale = (target != ignore_index).sum().float().reciprocal() if is_mean else None
    dx = x.new_empty(x.shape if need_dx else 0)
    # Zeros: no rows at all leave them so.
    dweight = (
        weight.new_empty(weight.shape) if need_dweight and rows else weight.new_zeros(_shape(weight, need_dweight))
    )
    dbias = x.new_zeros(_shape(bias, need_dbias), dtype=torch.float32)
    gradient = need_dx or need_dweight or need_dbias
    step = chunk_rows(rows, x.shape[1], need_dweight)
    buffer = _logits(x, step, vocab)
    for start in range(0, rows, max(step, 1)):
        chunk = slice(start, min(start + step, rows))
        logits = buffer[: chunk.stop - start]
        if bias is None:
            torch.mm(x[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[chunk], weight.t(), out=logits)
        torch.ops.infuse.cross_entropy_rows(
            logits, target[chunk], scale, ignore_index, label_smoothing, softcap, gradient, -1, losses[chunk]
        )
        if need_dx:
            torch.mm(logits, weight, out=dx[chunk])
        if need_dweight and start == 0:
            torch.mm(logits.t(), x[chunk], out=dweight)
        elif need_dweight:
            dweight.addmm_(logits.t(), x[chunk])
        if need_dbias:
            dbias += logits.sum(0, dtype=torch.float32)
    loss = losses.sum()
    return loss if scale is None else loss * scale, dx, dweight, dbias.to(x.dtype)


def _shape(tensor: Tensor | None, needed: bool) -> tuple[int, ...]:
    return tuple(tensor.shape) if needed and tensor is not None else (0,)


def _logits(x: Tensor, rows: int, vocab: int) -> Tensor:
    """[rows, vocab], its rows aligned for the kernel."""
    multiple = cross_entropy_kernels.ALIGNMENT_BYTES // x.element_size()
    padded = -(-vocab // multiple) * multiple
    return x.new_empty(rows, padded)[:, :vocab]
