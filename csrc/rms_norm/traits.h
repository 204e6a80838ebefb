// Compile-time description of one RMSNorm kernel.
#pragma once

#include <type_traits>

#include "infuse/vec.cuh"
#include "rms_norm/plan.h"

namespace infuse::rms_norm {

// kX: dtype of x. kWeight: of the weight (x's or float32; x's when there is none). kOut: of the output (x's, or float32
// when an fp32 weight multiplies a value that was already rounded to x's dtype).
template <DType kX, DType kWeight, DType kOut>
struct Types {
  using x_type = Element<kX>;
  using weight_type = Element<kWeight>;
  using out_type = Element<kOut>;
  static_assert(kWeight == kX || kWeight == DType::kFloat32);
  static_assert(kOut == kX || (kOut == DType::kFloat32 && kWeight == DType::kFloat32));
};

// A kernel that keeps its row in registers: 16-byte accesses, kVecsPerThread of them a thread.
template <typename Types_, int kVecsPerThread_, bool kPersistent_>
struct RegisterTraits {
  using Types = Types_;
  static constexpr int kVecElems = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
  static constexpr int kVecsPerThread = kVecsPerThread_;
  static constexpr bool kPersistent = kPersistent_;

  static constexpr int kMaxThreads = kPersistent ? kMaxPersistentThreads : max_cta_threads(kVecsPerThread);
  // 64 registers for eight vectors, as for four, so that two CTAs of 512 threads overlap their loads and their sums. A
  // weight or an output wider than x doesn't fit in them.
  static constexpr bool kOneWidth = std::is_same_v<typename Types::x_type, typename Types::weight_type>;
  static constexpr int kMinCtas = !kPersistent && kVecsPerThread == 8 && kOneWidth ? 2 : 1;
  static_assert(!kPersistent || kVecsPerThread <= kMaxVecsPersistent, "two rows must fit in the registers");

  // Vectors of the weight in registers at a time. The first ones are fetched together with x, so that they are there
  // when the sum is; a persistent kernel keeps them for all rows if they are the whole weight of a thread.
  static constexpr int kWeightRegisters = kVecsPerThread > 4 ? 8 : 16;
  static constexpr int kWeightVecRegisters = kVecElems * static_cast<int>(sizeof(typename Types::weight_type)) / 4;
  static constexpr int kWeightChunk = smaller(kVecsPerThread, kWeightRegisters / kWeightVecRegisters);
  static_assert(kVecsPerThread % kWeightChunk == 0);
};

// A kernel that reads its row twice, for rows that are too long for the registers or not aligned.
template <typename Types_, int kVecElems_>
struct TwoPassTraits {
  using Types = Types_;
  static constexpr int kVecElems = kVecElems_;
  static constexpr int kUnroll = 4;  // loads in flight
  static constexpr int kMaxThreads = 1024;
};

}  // namespace infuse::rms_norm
