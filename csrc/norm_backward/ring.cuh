// Rows on their way from global to shared memory, several turns ahead of the one that is worked on. Each thread copies
// and reads back its own vectors, so no barrier is needed: shared memory only serves as registers that can be filled
// in the background.
#pragma once

#include <cstdint>

#include "infuse/async_copy.cuh"
#include "infuse/reduce.cuh"
#include "norm_backward/formula.cuh"
#include "norm_backward/traits.h"

namespace infuse::norm_backward {

// The vectors of a row that the thread `thread` of it holds: `chunk` threads, a warp or a whole shorter row, hold
// neighbouring ones, and so on kVecs times, before the next warp's begin.
struct Columns {
  std::uint32_t first, chunk;

  template <int kVecs>
  static __device__ __forceinline__ Columns of(std::uint32_t thread, std::uint32_t row_threads) {
    const std::uint32_t chunk = row_threads < kWarpSize ? row_threads : kWarpSize;
    const std::uint32_t lane = thread & (chunk - 1);
    return {(thread - lane) * kVecs + lane, chunk};
  }

  __device__ __forceinline__ std::uint32_t vec(int i) const { return first + i * chunk; }

  // Of the thread's first vector in a row of a tensor in global memory; offset: of the row, in elements.
  template <typename X>
  __device__ __forceinline__ char* address(const void* tensor, std::int64_t offset) const {
    return static_cast<char*>(const_cast<void*>(tensor)) + offset * static_cast<int>(sizeof(X)) +
           first * kVectorBytes;
  }

  // From one of the thread's vectors to its next.
  __device__ __forceinline__ std::uint32_t step_bytes() const { return chunk * kVectorBytes; }
};

// A stage of a warp is [tensor][vector][lane] of 16 bytes and [statistic][lane] of 4; a warp's stages lie together.
template <typename Traits>
class Ring {
 public:
  using X = typename Traits::X;
  static constexpr int kElems = Traits::kVecElems;
  static constexpr int kVecs = Traits::kVecs;

  __device__ __forceinline__ Ring(const Params& params, const Columns& columns)
      : params_(params), columns_(columns) {
    const std::uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
    const std::uint32_t lane = thread % kWarpSize;
    const std::uint32_t vector_bytes = params.num_tensors * kVecs * kWarpSize * kVectorBytes;
    stage_bytes_ = vector_bytes + kStatisticsBytes * kWarpSize;
    const std::uint32_t warp_bytes = params.stages * stage_bytes_;
    first_ = opaque(dynamic_shared_memory() + thread / kWarpSize * warp_bytes + lane * kVectorBytes, params.zero);
    statistics_ = opaque(vector_bytes - lane * (kVectorBytes - 4), params.zero);
    end_ = opaque(first_ + warp_bytes, params.zero);
    reading_ = writing_ = first_;
    // Vectors beyond the row are never copied, and stay zero.
    constexpr float kZeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (SharedAddress stage = first_; stage != end_; stage += stage_bytes_) {
      for (std::uint32_t i = 0; i < vector_bytes; i += kWarpSize * kVectorBytes) {
        store_shared(stage + i, pack<float>(kZeros));
      }
    }
  }

  // Starts the copies of a row, if there is one, into the next stage and ends their group. What is late waits for
  // start_late.
  __device__ __forceinline__ void start(std::uint32_t row) {
    if (row < params_.rows) {
      start_tensor(kX, row);
      copy_async<4>(writing_ + statistics_, params_.rstd + row, true);
      if constexpr (Traits::kCentered) {
        copy_async<4>(writing_ + statistics_ + kWarpSize * 4, params_.mean + row, true);
      }
    }
    if (!params_.late) start_rest(row);
  }

  __device__ __forceinline__ void start_late(std::uint32_t row) {
    if (params_.late) start_rest(row);
  }

  // Waits for the oldest row, when as many were started as there are stages.
  __device__ __forceinline__ void wait() const {
    switch (params_.stages - params_.late) {
      case 1: return wait_for_copies<0>();
      case 2: return wait_for_copies<1>();
      default: return wait_for_copies<2>();
    }
  }

  // Of the oldest row.
  __device__ __forceinline__ Vec<X, kElems> get(std::uint32_t tensor, int i) const {
    return load_shared<X, kElems>(reading_ + slot(tensor, i));
  }

  // The sum of its terms, in fp32.
  __device__ __forceinline__ void get_dy(int i, float (&dy)[kElems]) const {
    unpack(get(kDy, i), dy);
#pragma unroll 1
    for (std::uint32_t tensor = Traits::kFixedTensors; tensor < params_.dsum; ++tensor) {
      float term[kElems];
      unpack(get(tensor, i), term);
      add(term, dy);
    }
  }

  __device__ __forceinline__ RowStats stats() const {
    RowStats stats = {0.0f, __uint_as_float(load_shared<float, 1>(reading_ + statistics_).words[0])};
    if constexpr (Traits::kCentered) {
      stats.mean = __uint_as_float(load_shared<float, 1>(reading_ + statistics_ + kWarpSize * 4).words[0]);
    }
    return stats;
  }

  // Gives up the oldest row.
  __device__ __forceinline__ void advance() { reading_ = after(reading_); }

 private:
  static __device__ __forceinline__ std::uint32_t slot(std::uint32_t tensor, int i) {
    return (tensor * kVecs + i) * kWarpSize * kVectorBytes;
  }

  __device__ __forceinline__ SharedAddress after(SharedAddress stage) const {
    return stage + stage_bytes_ == end_ ? first_ : stage + stage_bytes_;
  }

  __device__ __forceinline__ void start_rest(std::uint32_t row) {
    if (row < params_.rows) {
#pragma unroll
      for (int tensor = kDy; tensor < Traits::kFixedTensors; ++tensor) start_tensor(tensor, row);
#pragma unroll 1
      for (std::uint32_t tensor = Traits::kFixedTensors; tensor < params_.num_tensors; ++tensor) {
        start_tensor(tensor, row);
      }
    }
    end_copy_group();
    writing_ = after(writing_);
  }

  __device__ __forceinline__ void start_tensor(std::uint32_t tensor, std::uint32_t row) {
    const Rows& rows = params_.tensors[tensor];
    const char* source = columns_.address<X>(rows.data, rows.map.offset(row));
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      copy_async<16>(writing_ + slot(tensor, i), source + i * columns_.step_bytes(),
                     columns_.vec(i) < params_.row_vecs);
    }
  }

  const Params& params_;
  const Columns& columns_;
  SharedAddress first_, end_;        // of this thread's stages
  SharedAddress reading_, writing_;  // the oldest stage and the next to fill
  std::uint32_t stage_bytes_;
  std::uint32_t statistics_;  // leads from a stage to its statistics, modulo 2^32
};

}  // namespace infuse::norm_backward
