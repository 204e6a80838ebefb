// What the kernel of GEMMs that hand their results over is given: a_0 b_0 + a_1 b_1, a_i [rows, depth] with adjacent
// elements along the depth, b_i [depth, columns] with adjacent columns.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "handed_gemm/order.h"

namespace infuse::handed_gemm {

template <typename FinisherParams>
struct Params {
  // Boxes of 64 along the depth and a tile's rows of a, of 64 along the depth and 64 columns of b.
  CUtensorMap a[2], b[2];
  std::uint32_t steps[2];  // of 64 along the depth of each pair; 0: there is no such pair
  TileOrder order;
  FinisherParams finisher;
};

}  // namespace infuse::handed_gemm
