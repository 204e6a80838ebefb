// What happens to one vector of a row: load, combine with the operand, normalise, weight, gate, store.
#pragma once

#include <cstdint>
#include <type_traits>

#include "infuse/activation.cuh"
#include "infuse/memory.cuh"
#include "infuse/vec.cuh"
#include "norm/params.h"
#include "norm/plan.h"

namespace infuse::norm {

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

// How the weight is applied, decided once for a row and not for each element: weight, weight_offset + weight (also
// without a weight: then the offset is 1 and the weight reads as 0), or the weight behind a cast to x's dtype.
enum class Scale { kPlain, kWithOffset, kBehindCast };

template <Scale kScale>
using ScaleTag = std::integral_constant<Scale, kScale>;

// Calls `write` with the scale as a ScaleTag.
template <typename X, typename Write>
__device__ __forceinline__ void dispatch_scale(const Params& params, Write write) {
  if (sizeof(X) < 4 && params.cast_before_weight) {
    write(ScaleTag<Scale::kBehindCast>{});
  } else if (params.weight_offset != 0.0f) {
    write(ScaleTag<Scale::kWithOffset>{});
  } else {
    write(ScaleTag<Scale::kPlain>{});
  }
}

struct Statistics {
  float mean;  // 0 without centering
  float rstd;
};

// One row as a thread sees it. A row beyond the last has no vectors: it reads and writes nothing.
template <typename Types, int kVecElems_>
struct Row {
  static constexpr int kVecElems = kVecElems_;
  static constexpr bool kCenter = Types::kCenter;
  static constexpr bool kHasResidual = Types::kOperand == Operand::kResidual;
  static constexpr bool kGateFirst = Types::kOperand == Operand::kGateBeforeNorm;
  static constexpr bool kGateLast = Types::kOperand == Operand::kGateBehindNorm;
  static constexpr bool kHasOperand = Types::kOperand != Operand::kNone;
  // Whether the mean's rounding error matters: two-byte elements deviate from the mean by far more, or not at all, and
  // then their sum is exact.
  static constexpr bool kCorrectsMean = kCenter && sizeof(typename Types::x_type) == 4;
  using X = typename Types::x_type;
  using W = typename Types::weight_type;
  using XVec = Vec<X, kVecElems>;
  using WVec = Vec<W, kVecElems>;
  using Values = float[kVecElems];

  __device__ __forceinline__ Row(const Params& params_, std::uint64_t number) : params(params_) {
    exists = number < params.rows;
    index = exists ? static_cast<std::uint32_t>(number) : 0;
    num_vecs = exists ? params.row_vecs : 0;
    weight_vecs = params.weight != nullptr ? num_vecs : 0;
    bias_vecs = params.bias != nullptr ? num_vecs : 0;
    x = static_cast<const X*>(params.x.data) + params.x.map.offset(index);
    if constexpr (kHasOperand) operand = static_cast<const X*>(params.operand.data) + params.operand.map.offset(index);
    if constexpr (kHasResidual) sum = static_cast<X*>(params.sum) + std::size_t{index} * params.dim;
    out_offset = params.out.map.offset(index);
    weight = static_cast<const W*>(params.weight);
    if constexpr (kGateFirst || kGateLast) {
      weight += std::size_t{index - params.groups.divide(index) * params.groups.divisor} * params.dim;
    }
    bias = static_cast<const W*>(params.bias);
  }

  template <Reuse kReuse>
  __device__ __forceinline__ XVec load_x(std::uint32_t vec) const {
    return load<kReuse, X, kVecElems>(x + std::size_t{vec} * kVecElems, vec < num_vecs);
  }
  template <Reuse kReuse>
  __device__ __forceinline__ XVec load_operand(std::uint32_t vec) const {
    return load<kReuse, X, kVecElems>(operand + std::size_t{vec} * kVecElems, vec < num_vecs);
  }
  // Zeros where there is none.
  __device__ __forceinline__ WVec load_weight(std::uint32_t vec) const {
    return load<Reuse::kShared, W, kVecElems>(weight + std::size_t{vec} * kVecElems, vec < weight_vecs);
  }
  __device__ __forceinline__ WVec load_bias(std::uint32_t vec) const {
    return load<Reuse::kShared, W, kVecElems>(bias + std::size_t{vec} * kVecElems, vec < bias_vecs);
  }

  // What is normalised: x, x + residual rounded to their dtype, or x * act(gate).
  __device__ __forceinline__ void combine(const XVec& x_vec, const XVec& operand_vec, Values& h) const {
    unpack(x_vec, h);
    if constexpr (kHasResidual || kGateFirst) {
      Values other;
      unpack(operand_vec, other);
#pragma unroll
      for (int i = 0; i < kVecElems; ++i) h[i] = kGateFirst ? h[i] * act(other[i]) : h[i] + other[i];
      if constexpr (kHasResidual) round_through<X>(h);
    }
  }

  // From h to y.
  template <Scale kScale>
  __device__ __forceinline__ void finish(Values& h, const Statistics& statistics, const WVec& weight_vec,
                                         const WVec& bias_vec, const XVec& gate_vec) const {
    Values w;
    unpack(weight_vec, w);
#pragma unroll
    for (int i = 0; i < kVecElems; ++i) h[i] = (kCenter ? h[i] - statistics.mean : h[i]) * statistics.rstd;
    if constexpr (kScale == Scale::kBehindCast) round_through<X>(h);
    // Only these forms round behind a cast where there is no weight.
    constexpr bool kMayLackWeight = kScale == Scale::kWithOffset || (kScale == Scale::kBehindCast && (kCenter || kGateLast));
#pragma unroll
    for (int i = 0; i < kVecElems; ++i) h[i] *= kMayLackWeight ? params.weight_offset + w[i] : w[i];
    // Behind the cast each operation of torch rounds to the wider dtype of both sides.
    if constexpr (kScale == Scale::kBehindCast && !Types::kWideWeight && (kCenter || kGateLast)) round_through<X>(h);
    if constexpr (kCenter) {
      Values b;
      unpack(bias_vec, b);
#pragma unroll
      for (int i = 0; i < kVecElems; ++i) h[i] += b[i];
    }
    if constexpr (kGateLast) {
      if (params.cast_before_gate) round_through<X>(h);
      Values g;
      unpack(gate_vec, g);
#pragma unroll
      for (int i = 0; i < kVecElems; ++i) h[i] *= act(g[i]);
    }
  }

  __device__ __forceinline__ void store_out(std::uint32_t vec, const Values& y) const {
    if (vec >= num_vecs) return;
    const std::size_t offset = out_offset + std::size_t{vec} * kVecElems;
    if (Types::kWideWeight && params.out_is_fp32) {
      store(static_cast<float*>(params.out.data) + offset, pack<float>(y));
    } else {
      store(static_cast<X*>(params.out.data) + offset, pack<X>(y));
    }
  }

  __device__ __forceinline__ void store_sum(std::uint32_t vec, const XVec& value) const {
    if (vec < num_vecs) store(sum + std::size_t{vec} * kVecElems, value);
  }

  // By one thread of the row.
  __device__ __forceinline__ void store_statistics(const Statistics& statistics) const {
    if (!exists) return;
    if (kCenter && params.mean != nullptr) params.mean[index] = statistics.mean;
    if (params.rstd != nullptr) params.rstd[index] = statistics.rstd;
  }

  // The mean is made of sums of elements that are scaled before they are added, so that no sum overflows that the mean
  // doesn't; the scale is a power of two, which rounds nothing.
  __device__ __forceinline__ float mean_of(float sum) const { return __fdiv_rn(sum, params.scaled_dim); }

  // From the mean of the squared deviations from a mean that is `rest` off. Rounding must not make the difference
  // negative, and what overflows stays infinite.
  __device__ __forceinline__ float reciprocal_std(float mean_of_squares, float rest) const {
    const float variance = mean_of_squares - fminf(rest * rest, 3.0e38f);
    return reciprocal_std(variance < 0.0f ? 0.0f : variance);
  }

  __device__ __forceinline__ float reciprocal_std(float mean_of_squares) const {
    // The comparison lets a NaN through, as torch's clamp does.
    const float minimum = mean_of_squares < params.eps ? params.eps : mean_of_squares;
    return rsqrtf(params.eps_as_minimum ? minimum : mean_of_squares + params.eps);
  }

  std::uint32_t num_vecs;

 private:
  __device__ __forceinline__ float act(float gate) const {
    return sigmoid<X>(gate) * (params.gate_is_silu ? gate : 1.0f);
  }

  const Params& params;
  bool exists;
  std::uint32_t index, weight_vecs, bias_vecs;
  const X *x, *operand;
  X* sum;
  const W *weight, *bias;
  std::int64_t out_offset;
};

}  // namespace infuse::norm
