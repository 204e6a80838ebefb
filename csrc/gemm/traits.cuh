// Sizes of the GEMM kernel and where things lie in its shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gemm/order.cuh"
#include "infuse/mbarrier.cuh"
#include "infuse/tma.cuh"
#include "infuse/wgmma.cuh"

namespace infuse::gemm {

constexpr int kWarpgroup = 128, kGroupRows = 64;
constexpr int kGroups = 2;                       // warpgroups that multiply; one more loads
constexpr int kThreads = (kGroups + 1) * kWarpgroup;
constexpr int kTileRows = kGroups * kGroupRows;  // of A and of the result
constexpr int kChunk = kSwizzledColumns;         // along K, of a stage
constexpr int kMaxSharedBytes = 227 * 1024;

// What B is.
enum class Operands {
  kOne,         // one matrix
  kSideBySide,  // two: the first half of a tile's columns is of b[0], the second of b[1], at the same place of both
  kInSequence,  // two, one after the other along K, as is A
};

// The result is A [rows, K] times B [columns, K] transposed. kN: columns of B of a tile. kByColumns: B lies in memory as
// [K, columns]; otherwise K is what is adjacent. EpilogueBytes: shared memory that the epilogue has.
template <typename T_, int kN_, bool kByColumns_, Operands kOperands_, int kEpilogueBytes_>
struct GemmTraits {
  using T = T_;
  static constexpr int kN = kN_;
  static constexpr bool kByColumns = kByColumns_;
  static constexpr Operands kOperands = kOperands_;
  static constexpr int kTileColumns = kOperands == Operands::kSideBySide ? kN / 2 : kN;
  static constexpr int kABytes = kTileRows * kSwizzledRowBytes;
  static constexpr int kBBytes = kN * kSwizzledRowBytes;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kEpilogueBytes = kEpilogueBytes_;
  static constexpr int kBarrierSpace = 1024;
  static constexpr int kStages = (kMaxSharedBytes - kEpilogueBytes - kBarrierSpace) / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kEpilogueBytes + kBarrierSpace;
  static constexpr int kLoaderRegisters = 40, kGroupRegisters = 232;
  static_assert(kN % 16 == 0 && kBBytes / 2 % kSwizzleBytes == 0 && kEpilogueBytes % kSwizzleBytes == 0);
  static_assert(!kByColumns || kN % 128 == 0, "halves of whole blocks of 64 columns");
};

struct GemmParams {
  CUtensorMap a[2];  // boxes of kGroupRows x kChunk
  CUtensorMap b[2];  // boxes of kN / 2 rows x kChunk, by columns of kChunk rows x 64; the third dimension are groups
  TileOrder order;
  std::uint32_t chunks, chunks_of_tile;  // along K: of each matrix, of all of them
  L2 keep_a, keep_b;     // how long their lines stay
};

// Stages, what the epilogue has, barriers.
template <typename Traits>
struct GemmShared {
  SharedAddress start;

  __device__ __forceinline__ SharedAddress a(std::uint32_t stage) const { return start + stage * Traits::kStageBytes; }
  __device__ __forceinline__ SharedAddress b(std::uint32_t stage) const { return a(stage) + Traits::kABytes; }
  __device__ __forceinline__ SharedAddress epilogue() const { return a(Traits::kStages); }
  __device__ __forceinline__ SharedAddress full(std::uint32_t stage) const {
    return epilogue() + Traits::kEpilogueBytes + stage * kBarrierBytes;
  }
  __device__ __forceinline__ SharedAddress empty(std::uint32_t stage) const { return full(Traits::kStages + stage); }
};

}  // namespace infuse::gemm
