// What the kernels of attention's gradients are given.
#pragma once

#include <cstdint>

#include "attention/dropout.h"
#include "attention/mask.h"
#include "attention/strides.h"
#include "attention/tile_map.h"
#include "infuse/rows.h"

namespace infuse::attention_backward {

using attention::Mask;
using attention::Strides;

struct Params {
  const void* dout;  // [batch, heads, queries, dim_v]
  const void* q;     // [batch, heads, queries, dim]
  const void* k;     // [batch, kv_heads, keys, dim]
  const void* v;     // [batch, kv_heads, keys, dim_v]
  const void* out;   // [batch, heads, queries, dim_v]
  const float* lse;  // [batch, heads, queries]
  const void* mask;
  void* dq;  // [batch, heads, queries, dim]
  void* dk;  // [batch, kv_heads, keys, dim]
  void* dv;  // [batch, kv_heads, keys, dim_v]
  // Workspace, of which the first kernel fills all but the parts. Rows beyond the last query see nothing.
  float* lse_log2;     // [batch * heads, padded_queries], in powers of 2; plus infinity for a row without gradient
  float* delta;        // [batch * heads, padded_queries], the sum over dim_v of dout * out
  float* dq_sum;       // [batch * heads, padded_queries, padded_dim], zeros; see dq_tiles.cuh for the order
  std::uint32_t* turns;  // [batch * heads, query_blocks] and one more, zeros; null where any order will do
  // Of several splits of the heads: [splits, batch * kv_heads, keys, dim] and [.., dim_v], else null.
  float* dk_parts;
  float* dv_parts;
  Strides dout_stride, q_stride, k_stride, v_stride, out_stride, dq_stride, dk_stride, dv_stride, mask_stride;
  attention::TileMapView map;
  attention::Dropout dropout;
  std::uint32_t batch, heads, kv_heads, queries, keys, dim, dim_v;
  std::uint32_t padded_queries, padded_dim;  // of the workspace
  std::uint32_t query_blocks, key_blocks;
  std::uint32_t splits;  // of the heads that share K and V
  std::uint32_t heads_at_once;  // K/V heads, or splits of their heads, that CTAs come to before others
  std::uint32_t stages;  // of Q and dout in shared memory
  FastDivisor head_divisor, padded_query_divisor, split_divisor, kv_head_divisor;
  FastDivisor group;     // heads that share K and V
  float scale;
  float scale_log2;      // scale * log2(e); with a softcap, scale / softcap
  float softcap_log2;    // softcap * log2(e), 0 without
  Mask mask_kind;
  bool is_causal;        // query i reads keys 0 .. i
};

}  // namespace infuse::attention_backward
