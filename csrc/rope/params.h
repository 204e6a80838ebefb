// What the rotary kernels are given: up to three tensors that are worked on by one launch, and what they share.
#pragma once

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/rows.h"

namespace infuse::rope {

constexpr int kMaxParts = 3;  // q, k and v
constexpr std::uint32_t kNoCta = 0xffffffffu;

// A table of factors: [outer, inner, factors], broadcast over heads.
struct Table {
  const void* data;
  std::int64_t outer_stride, inner_stride;  // elements, 0 where it is broadcast
  std::int64_t step;                        // between the factors of a row
};

// One tensor: x [outer, inner, heads, dim], out alike. Elements of a row are adjacent in both.
struct Part {
  const void* x;
  void* out;
  Table cos, sin;      // null: the rows are copied
  const void* weight;  // [dim] contiguous, or null
  // The backward of a norm: x is dy and out is dx; what was normalised, as x; sums for the weight's gradient, one row
  // for each CTA [CTAs, dim], or null.
  const void* saved;
  float* weight_parts;
  // Where along out's inner dimension each row goes, [inner] of int64 or int32; null: where it was in x.
  const void* positions;
  std::int64_t x_stride[3], out_stride[3], saved_stride[3];  // elements: outer, inner, heads
  std::int64_t position_stride;
  std::int64_t num_positions;  // size of out's inner dimension, where there are positions
  std::uint32_t first_cta;     // kNoCta: there is no such part
  std::uint32_t items;         // outer * inner * head_blocks, what a group of lanes works on
  std::uint32_t heads;
  FastDivisor head_blocks, inner;
  bool rotates, has_norm, wide_positions;
};

struct Params {
  Part parts[kMaxParts];
  std::uint32_t num_parts;
  std::uint32_t dim;         // of a row
  std::uint32_t rotary_dim;  // its first elements, which are rotated; even
  std::uint32_t batches;     // of a lane's heads, worked on one after the other
  float inv_dim;             // 1 / dim
  float eps;
  float weight_offset;      // 0 when cast_before_weight
  std::uint32_t zero;       // always 0, see keep_packed
  bool wide_weight;         // weights are float32 and x is not
  bool cast_before_weight;  // round the normalised value to x's dtype before the weight multiply
  bool interleaved;         // a pair is two neighbours, not an element of each half
  bool per_pair;            // a table has rotary_dim / 2 factors, not rotary_dim
  bool inverse;             // the other way
  bool sin_of_partner;      // each element takes its partner's sin: the transpose of the rotation
  bool rounds_products;     // every operation is rounded to x's two-byte dtype, which the tables share
  bool zipped_tables;       // cos and sin of an element side by side, in one table
  DType cos_dtype, sin_dtype;  // read by the narrow kernel, the others have them in their types
};

}  // namespace infuse::rope
