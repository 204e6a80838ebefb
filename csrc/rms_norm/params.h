// What the RMSNorm kernels are given: pointers with their shapes, and the scalars of the formula.
#pragma once

#include <cstdint>

#include "infuse/rows.h"

namespace infuse::rms_norm {

struct Params {
  const void* x;       // [rows, dim] through x_rows, elements of a row adjacent
  const void* weight;  // [dim] contiguous, or null
  void* out;           // [rows, dim] through out_rows, elements of a row adjacent
  RowMap x_rows;
  RowMap out_rows;
  std::uint32_t rows;       // at most kMaxRows
  std::uint32_t row_vecs;   // dim / vector width
  float inv_dim;            // 1 / dim
  float eps;
  float weight_offset;      // 0 when cast_before_weight
  std::uint32_t zero;       // always 0, see keep_packed
  bool cast_before_weight;  // round the normalised value to x's dtype before the weight multiply
};

}  // namespace infuse::rms_norm
