// What the kernels of attention with few query rows are given.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/mask.h"
#include "attention/strides.h"
#include "infuse/rows.h"

namespace infuse::attention_decode {

using attention::Mask;
using attention::Strides;

struct Params {
  CUtensorMap k_map, v_map;  // of dealt_kernel, in boxes of 64 columns of a tile
  const void* q;  // [batch, heads, queries, dim]
  const void* k;  // [batch, kv_heads, keys, dim]
  const void* v;  // [batch, kv_heads, keys, dim_v]
  const void* mask;
  const void* sinks;  // [heads] or null
  void* out;          // [batch, heads, queries, dim_v]
  // Of several splits that are merged by a second kernel: [batch * kv_heads * rows, splits, dim_v], without a
  // denominator, and [.., splits, 2] of largest score (in powers of 2) and sum.
  float* part_out;
  float* part_sums;
  Strides q_stride, k_stride, v_stride, out_stride, mask_stride;
  std::uint32_t keys, dim, dim_v;
  std::uint32_t rows;      // queries * heads of a group; row r is query r / group of head r % group
  std::uint32_t batch, kv_heads;
  std::uint32_t tiles;     // of keys
  std::uint32_t splits;
  std::uint32_t row_warps;  // warps that share a tile, each with 16 rows: 1, 2 or 4
  std::uint32_t stage_bytes;
  std::uint32_t bits_offset;  // of a bit for each tile, in shared memory
  FastDivisor group, row_blocks;
  // Rows that a CTA of a cluster merges, and places in shared memory, of dealt_kernel; share, inbox_offset and
  // barrier_offset of direct_kernel, too.
  FastDivisor share;
  std::uint32_t ring_offset, mask_offset, inbox_offset, barrier_offset;
  std::uint32_t mask_bytes;  // of a tile
  float scale_log2;        // scale * log2(e); with a softcap, scale / softcap
  float softcap_log2;      // softcap * log2(e), 0 without
  Mask mask_kind;
  bool sinks_fp32;
  bool mask_is_aligned;    // its rows can be read 16 bytes at a time
  bool skips_filled;       // additive masks' tiles of nothing but what they are filled with are not read
  bool is_causal;          // query i reads keys 0 .. i
  bool nan_for_masked_rows;
};

}  // namespace infuse::attention_decode
