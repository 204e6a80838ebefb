// What the norms' backward kernels are given: pointers with their shapes, and the scalars of the formula.
#pragma once

#include <cstdint>

#include "infuse/dtype.h"
#include "infuse/rows.h"

namespace infuse::norm_backward {

// A tensor [rows, dim] through a map, the elements of a row adjacent.
struct Rows {
  const void* data;
  RowMap map;
};

// What is read, in this order. Only x and dy are always there; a gate is tensor kGate, and behind all these come
// further terms of dy, and at last dsum, a gradient that is added to dx.
constexpr std::uint32_t kX = 0, kDy = 1, kGate = 2;
constexpr int kMaxDyTerms = 3;
constexpr int kMaxTensors = 6;

// Statistics and partial sums are fp32.
struct Params {
  Rows tensors[kMaxTensors];
  std::uint32_t num_tensors;
  std::uint32_t more_dy, dsum;  // where the further terms of dy begin and where they end, which is dsum's place
  const void* weight;   // [dim] contiguous, or null
  const float* mean;    // [rows], or null for RMSNorm
  const float* rstd;    // [rows]
  void* dx;             // [rows, dim] contiguous
  void* dgate;          // likewise, of kernels with a gate
  float* row_means;     // [rows, 2] contiguous, of the two-pass kernels: mean(g), mean(g * n)
  float* weight_parts;  // [parts, dim] contiguous, or null: sums over some rows each
  float* bias_parts;    // likewise
  std::uint32_t rows;      // at most kMaxRows
  std::uint32_t row_vecs;  // dim / vector width
  std::uint32_t dim;
  float inv_dim;        // 1 / dim
  float weight_offset;  // 1 without a weight
  float constant_rstd;  // from here on rstd comes from the minimum and depends on nothing; infinity without one
  std::uint32_t stages;  // rows on their way at once, of the ring kernel
  bool late;             // see Config
  std::uint32_t zero;    // always 0, see keep_packed
  DType weight_dtype;    // x's or float32
  bool gate_first;       // the gate is applied before the norm, else behind it
  bool gate_is_silu;     // act(gate) = gate * sigmoid(gate), else sigmoid(gate)
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
