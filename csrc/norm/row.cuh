// What happens to one vector of a row: load, combine with the operand, normalise, weight, gate, store.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/vec.cuh"
#include "norm/params.h"
#include "norm/plan.h"

namespace infuse::norm {

// Through the fast exponential and the fast division where the result is rounded to two bytes; they deviate by 2^-21
// and flush what is below fp32's smallest normal number.
template <typename X>
__device__ __forceinline__ float sigmoid(float value) {
  if constexpr (sizeof(X) == 4) return 1.0f / (1.0f + expf(-value));
  return __fdividef(1.0f, 1.0f + __expf(-value));
}

// Keeps fp32 values in the registers of two packed vectors; fp32 elements need one of them only.
template <typename T, int kElems>
__device__ __forceinline__ void put_fp32(const float (&values)[kElems], Vec<T, kElems>& first, Vec<T, kElems>& second) {
  constexpr int kWords = Vec<T, kElems>::kWords;
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    (i < kWords ? first.words[i % kWords] : second.words[i % kWords]) = __float_as_uint(values[i]);
  }
}

template <typename T, int kElems>
__device__ __forceinline__ void get_fp32(const Vec<T, kElems>& first, const Vec<T, kElems>& second,
                                         float (&values)[kElems]) {
  constexpr int kWords = Vec<T, kElems>::kWords;
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    values[i] = __uint_as_float(i < kWords ? first.words[i % kWords] : second.words[i % kWords]);
  }
}

struct Statistics {
  float mean;  // 0 without centering
  float rstd;
};

template <typename Types, int kVecElems_>
struct Row {
  static constexpr int kVecElems = kVecElems_;
  static constexpr bool kHasResidual = Types::kOperand == Operand::kResidual;
  static constexpr bool kHasGate = Types::kOperand == Operand::kGate;
  static constexpr bool kHasOperand = kHasResidual || kHasGate;
  using X = typename Types::x_type;
  using W = typename Types::weight_type;
  using XVec = Vec<X, kVecElems>;
  using WVec = Vec<W, kVecElems>;
  using Values = float[kVecElems];

  // The row `number`; one beyond the last reads nothing and writes nothing.
  __device__ __forceinline__ Row(const Params& params_, std::uint64_t number)
      : params(params_), exists(number < params_.rows), index(exists ? static_cast<std::uint32_t>(number) : 0) {
    if (params.groups.divisor > 1) {
      weight_offset = std::size_t{index - params.groups.divide(index) * params.groups.divisor} * params.dim;
    }
  }

  __device__ __forceinline__ bool holds(std::uint32_t vec) const { return exists && vec < params.row_vecs; }

  template <Reuse kReuse>
  __device__ __forceinline__ XVec load_x(std::uint32_t vec) const {
    return load_rows<kReuse>(params.x, vec);
  }
  template <Reuse kReuse>
  __device__ __forceinline__ XVec load_operand(std::uint32_t vec) const {
    return load_rows<kReuse>(params.operand, vec);
  }
  __device__ __forceinline__ WVec load_weight(const void* weight, std::uint32_t vec) const {
    return load<Reuse::kShared, W, kVecElems>(
        static_cast<const W*>(weight) + weight_offset + std::size_t{vec} * kVecElems, holds(vec) && weight != nullptr);
  }

  // What is normalised: x, x + residual rounded to their dtype, or x * act(gate).
  __device__ __forceinline__ void combine(const XVec& x, const XVec& operand, Values& h) const {
    unpack(x, h);
    if constexpr (kHasOperand) {
      if (kHasGate && params.norm_before_gate) return;
      Values other;
      unpack(operand, other);
#pragma unroll
      for (int i = 0; i < kVecElems; ++i) h[i] = kHasGate ? h[i] * act(other[i]) : h[i] + other[i];
      if constexpr (kHasResidual) round_through<X>(h);
    }
  }

  // From h to y. `gate` counts only where the norm comes before it.
  __device__ __forceinline__ void finish(Values& h, const Statistics& statistics, const WVec& weight, const WVec& bias,
                                         const XVec& gate) const {
#pragma unroll
    for (int i = 0; i < kVecElems; ++i) h[i] = (h[i] - statistics.mean) * statistics.rstd;
    if (params.cast_before_weight) round_through<X>(h);
    if (params.weight != nullptr) {
      Values w;
      unpack(weight, w);
#pragma unroll
      for (int i = 0; i < kVecElems; ++i) h[i] *= params.weight_offset + w[i];
    }
    // Behind the cast each operation of torch rounds to the wider dtype of both sides.
    if (params.cast_before_weight && !Types::kWideWeight && (kHasGate || params.bias != nullptr)) round_through<X>(h);
    if (params.bias != nullptr) {
      Values b;
      unpack(bias, b);
#pragma unroll
      for (int i = 0; i < kVecElems; ++i) h[i] += b[i];
    }
    if constexpr (kHasGate) {
      if (!params.norm_before_gate) return;
      if (params.cast_before_gate) round_through<X>(h);
      Values g;
      unpack(gate, g);
#pragma unroll
      for (int i = 0; i < kVecElems; ++i) h[i] *= act(g[i]);
    }
  }

  __device__ __forceinline__ void store_out(std::uint32_t vec, const Values& y) const {
    if (!holds(vec)) return;
    const std::size_t offset = params.out.map.offset(index) + std::size_t{vec} * kVecElems;
    if (Types::kWideWeight && params.out_is_fp32) {
      store(static_cast<float*>(params.out.data) + offset, pack<float>(y));
    } else {
      store(static_cast<X*>(params.out.data) + offset, pack<X>(y));
    }
  }

  __device__ __forceinline__ void store_sum(std::uint32_t vec, const XVec& sum) const {
    const std::size_t offset = std::size_t{index} * params.dim + std::size_t{vec} * kVecElems;
    if (holds(vec)) store(static_cast<X*>(params.sum) + offset, sum);
  }

  // By one thread of the row.
  __device__ __forceinline__ void store_statistics(const Statistics& statistics) const {
    if (!exists) return;
    if (params.mean != nullptr) params.mean[index] = statistics.mean;
    if (params.rstd != nullptr) params.rstd[index] = statistics.rstd;
  }

  __device__ __forceinline__ float reciprocal_std(float mean_of_squares) const {
    // The comparison lets a NaN through, as torch's clamp does.
    const float minimum = mean_of_squares < params.eps ? params.eps : mean_of_squares;
    return rsqrtf(params.eps_as_minimum ? minimum : mean_of_squares + params.eps);
  }

 private:
  template <Reuse kReuse>
  __device__ __forceinline__ XVec load_rows(const Rows& rows, std::uint32_t vec) const {
    const std::size_t offset = rows.map.offset(index) + std::size_t{vec} * kVecElems;
    return load<kReuse, X, kVecElems>(static_cast<const X*>(rows.data) + offset, holds(vec));
  }

  __device__ __forceinline__ float act(float gate) const {
    return sigmoid<X>(gate) * (params.gate_is_silu ? gate : 1.0f);
  }

  const Params& params;
  const bool exists;
  const std::uint32_t index;
  std::size_t weight_offset = 0;
};

}  // namespace infuse::norm
