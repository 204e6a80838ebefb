// Compile-time description of the norms' backward kernels.
#pragma once

#include "infuse/vec.cuh"
#include "norm_backward/plan.h"

namespace infuse::norm_backward {

// The kernel that reads its rows once. kX: dtype of all tensors with rows. kWeight: of the weight (x's or float32; x's
// when there is none).
template <DType kX, DType kWeight, int kVecsPerThread, Form kForm>
struct RingTraits {
  using X = Element<kX>;
  using W = Element<kWeight>;
  static_assert(kWeight == kX || kWeight == DType::kFloat32);
  static constexpr int kVecElems = kVectorBytes / static_cast<int>(sizeof(X));
  static constexpr int kVecs = kVecsPerThread;
  static constexpr bool kCentered = kForm == Form::kLayerNorm;
  static constexpr bool kGated = kForm == Form::kGatedRmsNorm;
  static constexpr int kFixedTensors = kGated ? 3 : 2;
  static constexpr int kMaxThreads = max_cta_threads(kVecs, kForm);
  // Whether n and g stay in registers while the row's sums are taken. If not, they are computed again.
  static constexpr bool kHoldsRow = !kGated && kVecs * kVecElems <= 16;
};

// The kernels that read x and dy twice, for rows that are too long or not aligned.
template <DType kX, int kVecElems_>
struct TwoPassTraits {
  using X = Element<kX>;
  static constexpr int kVecElems = kVecElems_;
  static constexpr int kUnroll = kVecElems == 1 ? 4 : 2;  // rows or vectors in flight
};

}  // namespace infuse::norm_backward
