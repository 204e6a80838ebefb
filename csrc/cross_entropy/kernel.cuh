// Cross entropy of rows of logits z with one target t each, and its gradient in the logits' place:
//
//     loss = (1 - s) (lse - z_t) + s (lse - mean(z))             s: label smoothing, lse = log(sum(exp(z)))
//     z   <- scale (exp(z - lse) - (1 - s) [v = t] - s / vocab)
//
// A row whose target is ignored has the loss 0 and the gradient 0; one whose target is not in the vocabulary NaN. All
// in fp32, rounded once. A CTA takes one row. It reads it twice, the second time from shared memory as far as that
// holds it, and the rest from L2, where it was a moment ago.
#pragma once

#include <cstdint>

#include "cross_entropy/log_sum_exp.cuh"
#include "cross_entropy/params.h"
#include "cross_entropy/plan.h"
#include "cross_entropy/single.cuh"
#include "infuse/async_copy.cuh"
#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"

namespace infuse::cross_entropy {

constexpr int kUnroll = 4;  // vectors that a thread loads at once

template <DType kDType>
struct RowOf {
  using T = Element<kDType>;
  static constexpr int kElems = kVectorBytes / static_cast<int>(sizeof(T));
  using Vector = Vec<T, kElems>;
  static constexpr std::uint32_t kMinusInfinity =
      kDType == DType::kBFloat16 ? 0xff80ff80u : kDType == DType::kFloat16 ? 0xfc00fc00u : 0xff800000u;

  T* row;
  std::uint32_t num_vecs, num_elems;
  std::uint32_t cached_vecs;
  SharedAddress cache;

  __device__ __forceinline__ RowOf(const Params& params, std::uint32_t index)
      : row(static_cast<T*>(params.logits) + index * params.row_stride),
        num_vecs(params.vocab / kElems),
        num_elems(params.vocab),
        cached_vecs(params.cached_vecs),
        cache(dynamic_shared_memory()) {}

  // The vector, or -inf beyond the row.
  __device__ __forceinline__ Vector load(std::uint32_t vec) const {
    Vector loaded;
#pragma unroll
    for (int i = 0; i < Vector::kWords; ++i) loaded.words[i] = kMinusInfinity;
    load_16_bytes<Reuse::kOnce>(loaded.words, row + std::uint64_t{vec} * kElems, vec < num_vecs);
    return loaded;
  }

  __device__ __forceinline__ Vector load_again(std::uint32_t vec) const {
    if (vec < cached_vecs) return load_shared<T, kElems>(cache + vec * kVectorBytes);
    return load(vec);
  }

  __device__ __forceinline__ void keep(std::uint32_t vec, const Vector& loaded) const {
    if (vec < cached_vecs) store_shared(cache + vec * kVectorBytes, loaded);
  }

  __device__ __forceinline__ void write(std::uint32_t vec, const Vector& written) const {
    if (vec < num_vecs) store(row + std::uint64_t{vec} * kElems, written);
  }

  // The elements behind the last whole vector: thread i has the i-th of them.
  __device__ __forceinline__ bool has_single() const { return num_vecs * kElems + threadIdx.x < num_elems; }
  __device__ __forceinline__ T& single() const { return row[num_vecs * kElems + threadIdx.x]; }
};

// Every thread gets the log-sum-exp of all threads' values and the sum of `total`.
__device__ __forceinline__ void merge_threads(LogSumExp& lse, float& total) {
  __shared__ float most[kMaxWarps], sums[kMaxWarps], totals[kMaxWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  lse.merge_lanes();
  total = group_sum(total, kWarpSize);
  if (lane == 0) {
    most[warp] = lse.most;
    sums[warp] = lse.sum;
    totals[warp] = total;
  }
  __syncthreads();
  const bool is_warp = lane < static_cast<int>(blockDim.x) / kWarpSize;
  lse = LogSumExp{};
  lse.merge(is_warp ? most[lane] : -INFINITY, is_warp ? sums[lane] : 0.0f);
  lse.merge_lanes();
  total = group_sum(is_warp ? totals[lane] : 0.0f, kWarpSize);
}

// What is put in place of a row whose gradient is the same everywhere.
template <typename Row>
__device__ __forceinline__ void fill(const Row& row, float value) {
  using T = typename Row::T;
  float values[Row::kElems];
#pragma unroll
  for (int i = 0; i < Row::kElems; ++i) values[i] = value;
  const auto written = pack<T>(values);
  for (std::uint32_t vec = threadIdx.x; vec < row.num_vecs; vec += blockDim.x) row.write(vec, written);
  if (row.has_single()) row.single() = narrow<T>(value);
}

template <typename Row>
__device__ __forceinline__ void read_row(const Row& row, bool keeps, bool sums, LogSumExp& lse, float& total) {
  for (std::uint32_t first = threadIdx.x; first < row.num_vecs; first += kUnroll * blockDim.x) {
    typename Row::Vector loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) loaded[i] = row.load(first + i * blockDim.x);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t vec = first + i * blockDim.x;
      float values[Row::kElems];
      unpack(loaded[i], values);
      float largest = values[0];
#pragma unroll
      for (int j = 1; j < Row::kElems; ++j) largest = fmaxf(largest, values[j]);
      lse.expect(largest);
#pragma unroll
      for (int j = 0; j < Row::kElems; ++j) lse.add(values[j]);
      if (sums && vec < row.num_vecs) {
#pragma unroll
        for (int j = 0; j < Row::kElems; ++j) total += values[j];
      }
      if (keeps) row.keep(vec, loaded[i]);
    }
  }
  if (row.has_single()) {
    const float value = widen(row.single());
    lse.expect(value);
    lse.add(value);
    total += value;
  }
}

// factor 2^(z log2(e) - base) - offset in place of each z.
template <typename Row>
__device__ __forceinline__ void write_gradient(const Row& row, float base, float factor, float offset) {
  using T = typename Row::T;
  for (std::uint32_t first = threadIdx.x; first < row.num_vecs; first += kUnroll * blockDim.x) {
    typename Row::Vector loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) loaded[i] = row.load_again(first + i * blockDim.x);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      float values[Row::kElems];
      unpack(loaded[i], values);
#pragma unroll
      for (int j = 0; j < Row::kElems; ++j) {
        values[j] = fmaf(exp2_approx(fmaf(values[j], kLog2e, -base)), factor, -offset);
      }
      row.write(first + i * blockDim.x, pack<T>(values));
    }
  }
  if (row.has_single()) {
    row.single() = narrow<T>(fmaf(exp2_approx(fmaf(widen(row.single()), kLog2e, -base)), factor, -offset));
  }
}

template <DType kDType>
__global__ __launch_bounds__(kMaxThreads, 1) void rows_kernel(const __grid_constant__ Params params) {
  using Row = RowOf<kDType>;
  const Row row(params, blockIdx.x);
  wait_for_previous_kernel();
  const std::int64_t target = params.target[blockIdx.x];
  const bool ignored = target == params.ignore_index;
  if (ignored || target < 0 || target >= params.vocab) {
    const float value = ignored ? 0.0f : NAN;
    if (threadIdx.x == 0) params.loss[blockIdx.x] = value;
    if (params.gradient) fill(row, value);
    return;
  }
  const float z = widen(row.row[target]);
  const float smoothing = params.label_smoothing;
  const float scale = params.scale == nullptr ? 1.0f : *params.scale;

  LogSumExp lse;
  float total = 0.0f;
  read_row(row, params.gradient, smoothing != 0.0f, lse, total);
  merge_threads(lse, total);

  const float log_sum = __log2f(lse.sum);
  if (threadIdx.x == 0) {
    const auto behind = [&](float x) { return kLn2 * (log_sum - fmaf(x, kLog2e, -lse.base)); };  // lse - x
    float loss = behind(z);
    if (smoothing != 0.0f) {
      loss = (1.0f - smoothing) * loss + smoothing * behind(total / static_cast<float>(params.vocab));
    }
    params.loss[blockIdx.x] = loss;
  }
  if (!params.gradient) return;
  const float factor = __fdividef(scale, lse.sum);
  const float offset = scale * smoothing / static_cast<float>(params.vocab);
  write_gradient(row, lse.base, factor, offset);
  __syncthreads();
  if (threadIdx.x == 0) {
    const float p = exp2_approx(fmaf(z, kLog2e, -lse.base)) / lse.sum;
    row.row[target] = narrow<typename Row::T>(fmaf(scale, p - (1.0f - smoothing), -offset));
  }
}

}  // namespace infuse::cross_entropy
