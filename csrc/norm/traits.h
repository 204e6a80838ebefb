// Compile-time description of one norm kernel. Which formula it computes is for the most part told at run time: that
// costs a few uniform branches, and a kernel moves memory.
#pragma once

#include "infuse/vec.cuh"
#include "norm/plan.h"

namespace infuse::norm {

// kX: dtype of x, of what it is combined with, of the sum. kWeight: of weight and bias (x's or float32; x's when there
// are none).
template <DType kX, DType kWeight, Operand kOperand_>
struct Types {
  using x_type = Element<kX>;
  using weight_type = Element<kWeight>;
  static constexpr Operand kOperand = kOperand_;
  static constexpr bool kWideWeight = kWeight != kX;
  static_assert(!kWideWeight || kWeight == DType::kFloat32);
};

// A kernel that keeps its row in registers: 16-byte accesses, kVecsPerThread of them a thread.
template <typename Types_, int kVecsPerThread_>
struct RegisterTraits {
  using Types = Types_;
  static constexpr int kVecElems = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
  static constexpr int kVecsPerThread = kVecsPerThread_;
  static constexpr int kMaxThreads = max_cta_threads(kVecsPerThread, Types::kOperand);
  // 0 leaves it to the compiler, which then saves registers for the sake of more CTAs; of the longest rows it would
  // spill a few.
  static constexpr int kMinCtas = kVecsPerThread >= 8 ? 1 : 0;

  // Vectors of weight and bias in registers at a time. The first ones are fetched together with x, so that they are
  // there when the sum is.
  static constexpr bool kCrowded = kVecsPerThread >= (Types::kOperand == Operand::kResidual ? 4 : 8);
  static constexpr int kChunk = kCrowded || Types::kWideWeight ? 1 : smaller(kVecsPerThread, 2);
  static_assert(kVecsPerThread % kChunk == 0);
};

// A kernel that reads its row twice, for rows that are too long for the registers or not aligned.
template <typename Types_, int kVecElems_>
struct TwoPassTraits {
  using Types = Types_;
  static constexpr int kVecElems = kVecElems_;
  static constexpr int kUnroll = Types::kOperand == Operand::kNone ? 4 : 2;  // loads in flight, of each tensor
  static constexpr int kMaxThreads = 1024;
};

}  // namespace infuse::norm
