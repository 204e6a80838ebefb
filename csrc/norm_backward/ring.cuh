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
};

// A thread's vectors of a row tensor in global memory.
template <typename Traits>
class RowPointer {
 public:
  using X = typename Traits::X;

  __device__ __forceinline__ RowPointer(const void* tensor, const Columns& columns)
      : first_(static_cast<const char*>(tensor) + std::size_t{columns.first} * kVectorBytes),
        step_bytes_(columns.chunk * kVectorBytes) {}

  // offset: of the row, in elements.
  __device__ __forceinline__ const X* at(std::int64_t offset, int i) const {
    return reinterpret_cast<const X*>(first_ + offset * static_cast<int>(sizeof(X)) + i * step_bytes_);
  }

 private:
  const char* first_;
  std::uint32_t step_bytes_;
};

// A stage of a warp is [tensor][vector][lane] of 16 bytes and [statistic][lane] of 4; a warp's stages lie together.
template <typename Traits>
class Ring {
 public:
  using X = typename Traits::X;
  static constexpr int kElems = Traits::kVecElems;
  static constexpr int kVecs = Traits::kVecs;
  enum Tensor { kX, kDy, kDsum };

  __device__ __forceinline__ Ring(const Params& params, const Columns& columns)
      : params_(params),
        columns_(columns),
        x_(params.x, columns),
        dy_(params.dy, columns),
        dsum_(params.dsum, columns) {
    const std::uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
    const std::uint32_t lane = thread % kWarpSize;
    const std::uint32_t vector_bytes = (params.dsum != nullptr ? 3 : 2) * kVecs * kWarpSize * kVectorBytes;
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

  // Starts the copies of a row, if there is one, into the next stage and ends their group.
  __device__ __forceinline__ void start(std::uint32_t row) {
    if (row < params_.rows) {
      start_tensor(kX, x_, params_.x_rows.offset(row));
      start_tensor(kDy, dy_, params_.dy_rows.offset(row));
      if (params_.dsum != nullptr) start_tensor(kDsum, dsum_, params_.dsum_rows.offset(row));
      copy_async<4>(writing_ + statistics_, params_.rstd + row, true);
      if constexpr (Traits::kCentered) {
        copy_async<4>(writing_ + statistics_ + kWarpSize * 4, params_.mean + row, true);
      }
    }
    end_copy_group();
    writing_ = after(writing_);
  }

  // Waits for the oldest row, when as many were started as there are stages.
  __device__ __forceinline__ void wait() const {
    switch (params_.stages) {
      case 2: return wait_for_copies<1>();
      case 3: return wait_for_copies<2>();
      default: return wait_for_copies<3>();
    }
  }

  // Of the oldest row.
  __device__ __forceinline__ Vec<X, kElems> get(Tensor tensor, int i) const {
    return load_shared<X, kElems>(reading_ + slot(tensor, i));
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
  static __device__ __forceinline__ std::uint32_t slot(Tensor tensor, int i) {
    return (tensor * kVecs + i) * kWarpSize * kVectorBytes;
  }

  __device__ __forceinline__ SharedAddress after(SharedAddress stage) const {
    return stage + stage_bytes_ == end_ ? first_ : stage + stage_bytes_;
  }

  __device__ __forceinline__ void start_tensor(Tensor tensor, const RowPointer<Traits>& rows, std::int64_t offset) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      copy_async<16>(writing_ + slot(tensor, i), rows.at(offset, i), columns_.vec(i) < params_.row_vecs);
    }
  }

  const Params& params_;
  const Columns& columns_;
  RowPointer<Traits> x_, dy_, dsum_;
  SharedAddress first_, end_;        // of this thread's stages
  SharedAddress reading_, writing_;  // the oldest stage and the next to fill
  std::uint32_t stage_bytes_;
  std::uint32_t statistics_;  // leads from a stage to its statistics, modulo 2^32
};

}  // namespace infuse::norm_backward
