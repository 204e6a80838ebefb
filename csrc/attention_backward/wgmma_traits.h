// Sizes of the sm_90a kernel and where things lie in shared memory. Plain C++, for plans as well.
#pragma once

#include <cstdint>

namespace infuse::attention_backward {

// dim: of the kernel, 64 or 128. Tiles lie in halves of 64 columns, in rows of 128 bytes.
template <int kDimT>
struct WgmmaSizes {
  static constexpr int kDim = kDimT;
  static constexpr int kStages = 3;             // blocks of queries in shared memory
  static constexpr int kKeys = 128;             // of a CTA, 64 for each warpgroup that multiplies
  static constexpr int kQueries = 8192 / kDim;  // of a block
  static constexpr int kGroups = 2;
  static constexpr int kThreads = 128 * (kGroups + 1);

  static constexpr int kKeyHalf = kKeys * 128, kKeyBytes = kKeyHalf * (kDim / 64);
  static constexpr int kQueryHalf = kQueries * 128, kQueryBytes = kQueryHalf * (kDim / 64);
  static constexpr int kScoreHalf = kKeys * 128, kScoreBytes = kScoreHalf * (kQueries / 64);
  static constexpr int kRowBytes = kQueries * 4;
  static constexpr int kStepBytes = 16;

  static constexpr int kK = 0, kV = kK + kKeyBytes, kQ = kV + kKeyBytes, kDout = kQ + kStages * kQueryBytes,
                       kScores = kDout + kStages * kQueryBytes, kLse = kScores + 2 * kScoreBytes,
                       kDelta = kLse + kStages * kRowBytes, kSteps = kDelta + kStages * kRowBytes,
                       kBarriers = kSteps + kStages * kStepBytes,
                       kSharedBytes = kBarriers + 8 * (1 + 4 * kStages) + 1024;  // of which up to 1024 align the tiles
};

constexpr int wgmma_shared_bytes(int dim) {
  return dim <= 64 ? WgmmaSizes<64>::kSharedBytes : WgmmaSizes<128>::kSharedBytes;
}

}  // namespace infuse::attention_backward
