// What the kernels of attention with many query rows are given.
#pragma once

#include <cstdint>

#include "attention/dropout.h"
#include "attention/mask.h"
#include "attention/strides.h"
#include "attention/tile_map.h"
#include "infuse/rows.h"

namespace infuse::attention_forward {

using attention::Mask;
using attention::Strides;

struct Params {
  const void* q;  // [batch, heads, queries, dim]
  const void* k;  // [batch, kv_heads, keys, dim]
  const void* v;  // [batch, kv_heads, keys, dim_v]
  const void* mask;
  const void* sinks;  // [heads] or null
  void* out;          // [batch, heads, queries, dim_v]
  float* lse;         // [batch, heads, queries] or null
  // Of several splits, which a second kernel merges: [batch * heads * queries, splits, dim_v], without a denominator,
  // and [.., splits, 2] of largest score (in powers of 2) and sum.
  float* part_out;
  float* part_sums;
  Strides q_stride, k_stride, v_stride, out_stride, mask_stride;
  attention::TileMapView map;
  attention::Dropout dropout;
  std::uint32_t batch, queries, keys, dim, dim_v;
  std::uint32_t row_blocks;  // of queries
  std::uint32_t splits;      // of the keys
  FastDivisor heads;
  FastDivisor group;         // heads that share K and V
  float scale_log2;          // scale * log2(e); with a softcap, scale / softcap
  bool scales_first;         // scores are multiplied by that before they are compared, not after
  float softcap_log2;        // softcap * log2(e), 0 without
  bool two_stages;           // of tiles in shared memory
  Mask mask_kind;
  bool sinks_fp32;
  bool mask_is_aligned;      // its rows can be read 16 bytes at a time
  bool is_causal;            // query i reads keys 0 .. i
  bool nan_for_masked_rows;
};

}  // namespace infuse::attention_forward
