// What the norms' backward kernels are given: pointers with their shapes, and the scalars of the formula.
#pragma once

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/rows.h"

namespace infuse::norm_backward {

// Statistics and partial sums are fp32. "Rows" means [rows, dim] through a RowMap, elements of a row adjacent.
struct Params {
  const void* dy;       // rows
  const void* dsum;     // rows, or null: a gradient that is added to dx
  const void* x;        // rows
  const void* weight;   // [dim] contiguous, or null
  const float* mean;    // [rows], or null for RMSNorm
  const float* rstd;    // [rows]
  void* dx;             // [rows, dim] contiguous
  float* row_means;     // [rows, 2] contiguous, of the two-pass kernels: mean(g), mean(g * n)
  float* weight_parts;  // [parts, dim] contiguous, or null: sums over some rows each
  float* bias_parts;    // likewise
  RowMap dy_rows, dsum_rows, x_rows;
  std::uint32_t rows;      // at most kMaxRows
  std::uint32_t row_vecs;  // dim / vector width
  std::uint32_t dim;
  float inv_dim;  // 1 / dim
  float weight_offset;      // 1 without a weight
  std::uint32_t stages;     // rows on their way at once, of the ring kernel
  std::uint32_t zero;       // always 0, see keep_packed
  DType weight_dtype;       // x's or float32
};

// Sums of the parts, rounded to the gradient's dtype. Index 0: dweight, 1: dbias; null where there is none.
struct SumPartsParams {
  const float* parts[2];  // [num_parts, dim] contiguous
  void* out[2];           // [dim] contiguous
  DType dtype[2];
  std::uint32_t num_parts;
  std::uint32_t dim;
};

}  // namespace infuse::norm_backward
