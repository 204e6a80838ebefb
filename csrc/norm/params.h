// What the norm kernels are given: pointers with their shapes, and the scalars of the formulas.
#pragma once

#include <cstdint>

#include "infuse/rows.h"

namespace infuse::norm {

// A tensor [rows, dim] through a map, the elements of a row adjacent.
struct Rows {
  void* data;
  RowMap map;
};

struct Params {
  Rows x, out;         // read, written
  Rows operand;        // read: the residual or the gate, if the kernel has one
  void* sum;           // written: x + residual, [rows, dim] contiguous
  const void* weight;  // [groups, dim] contiguous, or null
  const void* bias;    // like the weight
  float* mean;         // written: [rows], or null
  float* rstd;         // written: [rows], or null
  std::uint32_t rows;      // at most kMaxRows; neighbouring rows belong to neighbouring groups
  std::uint32_t dim;       // elements of a row
  std::uint32_t row_vecs;  // dim / vector width
  std::uint32_t thread_vecs;  // of the ring kernel: vectors of a row that a thread holds
  FastDivisor groups;      // divides a row's number
  float inv_dim;           // 1 / dim
  float sum_scale;         // a power of two not above 1 / dim
  float scaled_dim;        // dim * sum_scale
  float eps;
  float weight_offset;      // 0 when cast_before_weight, 1 without a weight
  std::uint32_t zero;       // always 0, see keep_packed
  bool lets_next_start;     // before this kernel has ended
  bool eps_as_minimum;      // eps bounds the mean of squares from below instead of being added
  bool cast_before_weight;  // round the normalised value to x's dtype before weight and bias
  bool out_is_fp32;         // of kernels whose weight is wider than x
  bool cast_before_gate;    // round what is multiplied by the gate to x's dtype
  bool gate_is_silu;        // act(gate) = gate * sigmoid(gate), else sigmoid(gate)
};

}  // namespace infuse::norm
