// Compile-time description of one norm kernel. What the formula does to each element is decided here; the rest, such as
// groups, statistics and how eps is taken, is told at run time.
#pragma once

#include "infuse/vec.cuh"
#include "norm/plan.h"

namespace infuse::norm {

// kX: dtype of x, of what it is combined with, of the sum. kWeight: of weight and bias (x's or float32; x's when there
// are none). kCenter: LayerNorm, which subtracts the mean and adds a bias.
template <DType kX, DType kWeight, Operand kOperand_, bool kCenter_>
struct Types {
  using x_type = Element<kX>;
  using weight_type = Element<kWeight>;
  static constexpr Operand kOperand = kOperand_;
  static constexpr bool kCenter = kCenter_;
  static constexpr bool kWideWeight = kWeight != kX;
  static_assert(!kWideWeight || kWeight == DType::kFloat32);
};

// A kernel that keeps its row in registers: 16-byte accesses, kVecsPerThread of them a thread.
template <typename Types_, int kVecsPerThread_>
struct RegisterTraits {
  using Types = Types_;
  static constexpr int kVecElems = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
  static constexpr int kVecsPerThread = kVecsPerThread_;
  static constexpr int kMaxThreads = max_cta_threads(kVecsPerThread, Types::kOperand, Types::kCenter);

  // Vectors of weight and bias in registers at a time: 16 registers of them, 8 where registers are short.
  static constexpr int kWeightRegisters = (Types::kWideWeight ? 8 : 4) * (Types::kCenter ? 2 : 1);
  static constexpr bool kCrowded = kVecsPerThread == kMaxVecs && Types::kOperand != Operand::kNone;
  // A LayerNorm has two sums to wait for, and makes up for it with more CTAs on an SM.
  static constexpr bool kManyCtas = kMaxThreads < 512;
  // 0 leaves it to the compiler, which saves registers for the sake of more CTAs, and there would spill.
  static constexpr int kMinCtas = kManyCtas ? (Types::kWideWeight ? 4 : 5) : kCrowded && Types::kCenter ? 1 : 0;
  static constexpr int kAffordable = (kCrowded || kManyCtas ? 8 : 16) / kWeightRegisters;
  static constexpr int kChunk = kAffordable < 1 ? 1 : smaller(kVecsPerThread, kAffordable);
  static_assert(kVecsPerThread % kChunk == 0);
  // Whether the first weights are fetched when the statistics are there, and not together with x. Few rows, which take
  // fewer vectors a thread, would wait for them.
  static constexpr bool kLateWeights = Types::kCenter && kVecsPerThread == kMaxVecs;
};

// A kernel that reads its row twice, for rows that are too long for the registers or not aligned.
template <typename Types_, int kVecElems_>
struct TwoPassTraits {
  using Types = Types_;
  static constexpr int kVecElems = kVecElems_;
  static constexpr int kUnroll = Types::kOperand == Operand::kNone ? 4 : 2;  // loads in flight, of each tensor
  static constexpr int kMaxThreads = 1024;
  static constexpr int kMinCtas = kVecElems == 1 && Types::kCenter ? 1 : 0;  // as above
};

// A kernel that keeps its row in shared memory, and a part of the next ones.
template <typename Types_>
struct RingTraits {
  using Types = Types_;
  static constexpr int kVecElems = kVectorBytes / static_cast<int>(sizeof(typename Types::x_type));
  static constexpr int kMaxThreads = 1024;
  static constexpr int kChunk = Types::kWideWeight ? 1 : 2;  // vectors of weight and bias in registers at a time
};

}  // namespace infuse::norm
