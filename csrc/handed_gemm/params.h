// What the kernel of GEMMs that hand their results over is given.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "handed_gemm/order.h"

namespace infuse::handed_gemm {

// How two matrices b make up one result. One matrix is two in sequence, of which the second has no steps.
enum class Pair {
  kInSequence,  // a_0 b_0 + a_1 b_1
  kSideBySide,  // a_0 b_0 in the first half of a tile's columns, a_0 b_1 in the second, of the same columns of both
};

template <typename FinisherParams>
struct Params {
  // Boxes of 64 along the depth and a tile's rows of a. Of b: by columns boxes of 64 along the depth and 64 columns; by
  // rows, side by side, of 64 along the depth and half of a tile's columns.
  CUtensorMap a[2], b[2];
  std::uint32_t steps[2];  // of 64 along the depth of each pair
  TileOrder order;
  FinisherParams finisher;
};

}  // namespace infuse::handed_gemm
