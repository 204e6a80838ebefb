// The kernel whose CTAs stay and walk over the rows. While a CTA works on a row, the vectors of the next ones are on
// their way to shared memory, so that sums, barriers and exponentials don't keep the memory waiting.
#pragma once

#include <cstdint>

#include "infuse/async_copy.cuh"
#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"
#include "norm/row.cuh"
#include "norm/traits.h"

namespace infuse::norm {

// A thread's vectors of the rows it has a part in, one after another, in slots that are taken in turns: those of the
// row under work and kAhead of the following. Each thread copies and reads back its own vectors, so no barrier is needed.
// A slot is [x, operand][thread] of 16 bytes.
template <typename Traits>
class Ring {
 public:
  using Vectors = Row<typename Traits::Types, Traits::kVecElems>;
  using X = typename Vectors::X;
  static constexpr int kTensors = Vectors::kHasOperand ? 2 : 1;

  __device__ __forceinline__ explicit Ring(const Params& params) : params_(params), next_row_(blockIdx.x) {
    tensor_bytes_ = blockDim.x * kVectorBytes;
    first_ = dynamic_shared_memory() + threadIdx.x * kVectorBytes;
    end_ = first_ + (params.thread_vecs + kAhead) * kTensors * tensor_bytes_;
    writing_ = first_;
    aim();
    for (std::uint32_t i = 0; i < params.thread_vecs + kAhead; ++i) start();
  }

  __device__ __forceinline__ SharedAddress first() const { return first_; }
  __device__ __forceinline__ SharedAddress after(SharedAddress slot) const {
    slot += kTensors * tensor_bytes_;
    return slot == end_ ? first_ : slot;
  }
  __device__ __forceinline__ SharedAddress operand(SharedAddress slot) const { return slot + tensor_bytes_; }

  // Starts the copy of the next vector, if there is one, into the slot that was read longest ago.
  __device__ __forceinline__ void start() {
    const std::uint32_t vec = threadIdx.x + next_vec_ * blockDim.x;
    copy_async<kVectorBytes>(writing_, x_ + std::size_t{vec} * Traits::kVecElems, vec < num_vecs_);
    if constexpr (Vectors::kHasOperand) {
      copy_async<kVectorBytes>(operand(writing_), operand_ + std::size_t{vec} * Traits::kVecElems, vec < num_vecs_);
    }
    end_copy_group();
    writing_ = after(writing_);
    if (++next_vec_ == params_.thread_vecs) {
      next_vec_ = 0;
      next_row_ += gridDim.x;
      aim();
    }
  }

  // Until the vectors of the row under work are there.
  __device__ __forceinline__ void wait() const { wait_for_copies<kAhead>(); }

 private:
  // At the row that copies are started of next.
  __device__ __forceinline__ void aim() {
    num_vecs_ = next_row_ < params_.rows ? params_.row_vecs : 0;
    if (num_vecs_ == 0) return;
    x_ = static_cast<const X*>(params_.x.data) + params_.x.map.offset(next_row_);
    if constexpr (Vectors::kHasOperand) {
      operand_ = static_cast<const X*>(params_.operand.data) + params_.operand.map.offset(next_row_);
    }
  }

  const Params& params_;
  const X *x_ = nullptr, *operand_ = nullptr;
  std::uint32_t num_vecs_, next_row_, next_vec_ = 0;
  SharedAddress first_, end_, writing_;
  std::uint32_t tensor_bytes_;
};

template <typename Traits>
__global__ __launch_bounds__(Traits::kMaxThreads, 1) void ring_kernel(const __grid_constant__ Params params) {
  using Vectors = Row<typename Traits::Types, Traits::kVecElems>;
  using X = typename Vectors::X;
  using XVec = typename Vectors::XVec;
  constexpr int kElems = Traits::kVecElems;
  constexpr int kChunk = Traits::kChunk;
  __shared__ RowSumsStorage<2> storage;

  wait_for_previous_kernel();
  Ring<Traits> ring(params);
  SharedAddress reading = ring.first();
  const auto vec_of = [&](std::uint32_t i) { return threadIdx.x + i * blockDim.x; };

  // Calls `visit` for each of the thread's vectors of the row, with its number and its slot.
  const auto for_each = [&](auto visit) {
    SharedAddress slot = reading;
#pragma unroll 4
    for (std::uint32_t i = 0; i < params.thread_vecs; ++i) {
      visit(i, slot);
      slot = ring.after(slot);
    }
  };
  const auto get = [&](SharedAddress slot, float(&h)[kElems]) {
    const XVec x = load_shared<X, kElems>(slot);
    if constexpr (Vectors::kGateFirst) {
      get_fp32(x, load_shared<X, kElems>(ring.operand(slot)), h);
    } else {
      unpack(x, h);
    }
  };

  int turn = 0;
  for (std::uint32_t number = blockIdx.x; number < params.rows; number += gridDim.x) {
    const Vectors row(params, number);
    typename Vectors::WVec weight[kChunk], bias[kChunk] = {};
    const auto load_weights = [&](std::uint32_t first) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        weight[i] = row.load_weight(vec_of(first + i));
        if constexpr (Vectors::kCenter) bias[i] = row.load_bias(vec_of(first + i));
      }
    };
    ring.wait();
    load_weights(0);

    // The sum of the elements, or that of their squares, of h, which takes x's place (and the gate's, in fp32).
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for_each([&](std::uint32_t i, SharedAddress slot) {
      if (vec_of(i) >= row.num_vecs) return;
      float h[kElems];
      if constexpr (Vectors::kHasResidual || Vectors::kGateFirst) {
        XVec x = load_shared<X, kElems>(slot), operand = load_shared<X, kElems>(ring.operand(slot));
        row.combine(x, operand, h);
        if constexpr (Vectors::kGateFirst) {
          put_fp32(h, x, operand);
          store_shared(ring.operand(slot), operand);
        } else {
          x = pack<X>(h);
          row.store_sum(vec_of(i), x);
        }
        store_shared(slot, x);
      } else {
        get(slot, h);
      }
#pragma unroll
      for (int j = 0; j < kElems; ++j) {
        sums[j % 4] = fmaf(h[j], Vectors::kCenter ? params.sum_scale : h[j], sums[j % 4]);
      }
    });
    float sum[1] = {(sums[0] + sums[1]) + (sums[2] + sums[3])};
    row_sums(sum, storage, turn++);

    Statistics statistics{};
    if constexpr (Vectors::kCenter) {
      // As in register_kernel.
      const float mean = row.mean_of(sum[0]);
      float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f}, rests[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for_each([&](std::uint32_t i, SharedAddress slot) {
        if (vec_of(i) >= row.num_vecs) return;
        float h[kElems];
        get(slot, h);
#pragma unroll
        for (int j = 0; j < kElems; ++j) {
          const float deviation = h[j] - mean;
          squares[j % 4] = fmaf(deviation, deviation, squares[j % 4]);
          if constexpr (Vectors::kCorrectsMean) rests[j % 4] = fmaf(deviation, params.inv_dim, rests[j % 4]);
        }
      });
      float both[2] = {(squares[0] + squares[1]) + (squares[2] + squares[3]),
                       (rests[0] + rests[1]) + (rests[2] + rests[3])};
      row_sums(both, storage, turn++);
      statistics = {mean + both[1], row.reciprocal_std(both[0] * params.inv_dim, both[1])};
    } else {
      statistics.rstd = row.reciprocal_std(sum[0] * params.inv_dim);
    }
    if (threadIdx.x == 0) row.store_statistics(statistics);

    const auto write = [&](auto scale) {
      SharedAddress slot = reading;
      for (std::uint32_t first = 0; first < params.thread_vecs; first += kChunk) {
        if (first > 0) load_weights(first);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (first + i >= params.thread_vecs) break;
          float h[kElems];
          get(slot, h);
          XVec operand = {};
          if constexpr (Vectors::kGateLast) operand = load_shared<X, kElems>(ring.operand(slot));
          row.template finish<decltype(scale)::value>(h, statistics, weight[i], bias[i], operand);
          row.store_out(vec_of(first + i), h);
          ring.start();
          slot = ring.after(slot);
        }
      }
      reading = slot;
    };
    dispatch_scale<X>(params, write);
  }
  wait_for_copies<0>();
}

}  // namespace infuse::norm
