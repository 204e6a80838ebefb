// What the kernels for linears of few rows are given: pointers with their shapes, scalars of the formulas, and how the
// plan cuts the problem up.
#pragma once

#include <cstdint>

namespace infuse::skinny_linear {

constexpr int kMaxWeights = 3;
constexpr int kSquaresWidth = 4;  // neighbouring features whose squares are summed up for a norm behind

enum class Activation : int { kNone, kSilu, kGeluTanh, kGeluErf };

// y W^T, one of up to three; with an activation the first two are gate and up, of one result.
struct Linear {
  const void* weight;  // [features, dim]
  const void* bias;    // [features], or null
  void* out;           // written: [rows, features]; of the up projection null
  std::int64_t weight_stride, out_stride;  // elements, of a row
  std::uint32_t features;
  std::uint32_t first_tile;  // tiles of all linears are numbered through; of what does not exist beyond the last
  bool is_wide;              // 8 features of bias, out and addend begin at multiples of 16 bytes
  bool out_is_fp32;          // of x's dtype otherwise, which results are rounded to in any case
};

// RMSNorm of x, as in ops/rms_norm.py.
struct Norm {
  const void* residual;  // [rows, dim], added to x first, or null
  void* sum;             // written: x + residual, [rows, dim] contiguous, or null
  const void* weight;    // [dim], or null
  std::int64_t residual_stride;
  float eps, weight_offset;  // offset 1 without a weight
  float inv_dim;             // 1 / dim
  bool exists, weight_is_fp32, cast_before_weight, eps_as_minimum;
};

// RMSNorm in two halves, so that nothing stands between the kernels on both its sides: the one before scales its results
// by the norm's weight and sums up their squares, the one behind multiplies its sums by the reciprocal root mean square.
struct SplitNorm {
  void* scaled;          // written: out0 times norm.weight, [rows, features] contiguous, or null
  float* squares_out;    // written with it: of kSquaresWidth features each, [rows, features / kSquaresWidth]
  const float* squares;  // the same of x before it was scaled, [rows, dim / kSquaresWidth]; null where x is used as it is
};

struct Params {
  const void* x;       // [rows, dim]
  const void* addend;  // [rows, features], added to the first linear, or null
  std::int64_t x_stride, addend_stride;  // elements, of a row
  Linear linears[kMaxWeights];
  Norm norm;
  SplitNorm split_norm;
  Activation activation;
  std::uint32_t rows;  // 1 to 64
  std::uint32_t dim;   // a multiple of 8

  // Of the plan.
  std::uint32_t tile_rows;   // features of a tile
  std::uint32_t splits;      // CTAs, of one cluster, that share the columns of a tile
  std::uint32_t column_groups;  // warpgroups, 1 or 2, that share those of a CTA: each takes every second stage
  std::uint32_t iterations;  // stages that hold all columns
  std::uint32_t blocks;      // of 64 columns, in a stage
  std::uint32_t stages;
  std::uint32_t stage_bytes, x_offset;  // x behind the weights of a stage
  std::uint32_t kept_x_offset, norm_weight_offset, barrier_offset;  // in shared memory
};

}  // namespace infuse::skinny_linear
