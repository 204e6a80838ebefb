// What the GEMMs of a gated MLP's backward are given: out = sum over pairs of a b, a [rows, depth], b [depth, columns].
#pragma once

#include <cuda.h>

#include <cstdint>

#include "infuse/gated_activation.h"
#include "infuse/rows.h"

namespace infuse::gated_backward {

constexpr int kMaxPairs = 2;

// For the form whose result, dh, is not written but what becomes of it; see params.h.
struct GatedOutput {
  const void* gate_up;           // [rows, 2 columns]
  void* dgate_up;                // [rows, 2 columns] contiguous
  void* out;                     // [rows, columns] contiguous, or null
  std::int64_t gate_up_stride;   // elements
  Activation activation;
};

struct WgmmaParams {
  CUtensorMap a[kMaxPairs], b[kMaxPairs];  // boxes of 64 columns: all rows of a tile; 64 rows
  CUtensorMap c;                           // [rows, columns], boxes of 64 columns and all rows of a tile
  GatedOutput gated;
  std::uint32_t steps[kMaxPairs];  // of 64 along each pair's depth; 0: there is no such pair
  std::uint32_t rows, columns;
  std::uint32_t row_tiles, tiles;
  FastDivisor band_tiles, band_rows, last_band_rows;
};

}  // namespace infuse::gated_backward
