// Tiles of the mma.sync kernels of gated linears.
#pragma once

#include <cstdint>

#include "gated_linear/params.h"

namespace infuse::gated_linear {

struct MmaParams {
  Params base;
  std::uint32_t row_tiles, column_tiles;  // row_tiles: with groups, as many as they can have
  std::uint32_t stages;                   // of shared memory, 3 or 4
};

// Where a CTA works: its first row and column, where its group's rows end, and which group that is.
struct MmaTile {
  std::uint32_t row, row_end, column, group;
};

// A CTA has 128 rows and 64 columns of both gate and up; each of its four warps 64 rows and 32 of the columns. Along
// dim it takes kDepth elements at a time. In shared memory x lies in rows of 64 bytes; behind it the weights, by rows
// alike, 32 rows of the gate and of the up in turn, or by columns, for each 32 columns kDepth rows with those of the
// gate and of the up beside each other. So what a warp needs is in one place.
template <typename Element, bool kWeightsByColumns>
struct MmaTraits {
  using T = Element;
  static constexpr bool kByColumns = kWeightsByColumns;
  static constexpr int kWarpRows = 2, kWarpColumns = 2, kRows = 128, kColumns = 64;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns, kCtasPerSm = 2;
  static constexpr int kDepth = 32;
  static constexpr int kRowBytes = 2 * kDepth, kRowPieces = kRowBytes / 16;  // of 16 bytes
  static constexpr int kXBytes = kRows * kRowBytes;
  static constexpr int kWarpWeightBytes = 64 * kRowBytes;
  static constexpr int kStageBytes = kXBytes + kWarpColumns * kWarpWeightBytes;
  static constexpr int kCopyRows = kThreads / kRowPieces;  // that all threads copy with one access each
};

// Four stages where two CTAs of an SM have room for them.
constexpr int mma_stages(int shared_bytes) {
  constexpr int kStageBytes = MmaTraits<void, false>::kStageBytes;
  return shared_bytes >= 2 * (4 * kStageBytes + 1024) ? 4 : 3;
}

}  // namespace infuse::gated_linear
