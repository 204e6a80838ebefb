// A warpgroup's softmax: scores of a tile in the registers of the product, 64 rows, two of them in parts to a thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/softmax.cuh"
#include "attention_forward/wgmma_traits.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_forward {

using attention::in_powers_of_two;
using attention::kMinusInfinity;
using attention::power_of_two;

// To within 2e-7, which scores of a cap that is not huge don't feel.
__device__ __forceinline__ float tanh_by_power(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power_of_two(2.0f * attention::kLog2e * x)));
  return fmaf(-2.0f, inverse, 1.0f);
}

// The number of the thread, read anew at each call: what is derived from it would otherwise be computed once, before
// the tiles, and kept in registers that the sums need.
__device__ __forceinline__ std::uint32_t read_thread() {
  std::uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A warpgroup's 64 rows, the same for all its threads. Rows may lie beyond the last query.
struct GroupRows {
  std::uint32_t first;
  std::uint32_t batch_head;

  // The first of the thread's two rows; the other is 8 further.
  __device__ __forceinline__ std::uint32_t of_thread(std::uint32_t thread) const {
    return first + thread % kWarpgroup / kWarpSize * 16 + thread % kWarpSize / 4;
  }
  __device__ __forceinline__ std::uint32_t batch(const Params& params) const { return params.heads.divide(batch_head); }
  __device__ __forceinline__ std::uint32_t head(const Params& params) const {
    return batch_head - batch(params) * params.heads.divisor;
  }
};

// What a thread knows of its rows: a score in powers of two, such as the largest, that the sums are relative to, and
// the sum over its keys.
struct RowState {
  float largest[2] = {kMinusInfinity, kMinusInfinity};
  float sum[2] = {0.0f, 0.0f};
};

// Two neighbouring elements of a mask; what lies beyond the last key is any.
template <typename Element>
__device__ __forceinline__ void load_mask_pair(const Element* place, bool is_aligned, bool has_second,
                                               float (&pair)[2]) {
  if constexpr (sizeof(Element) == 1) {
    std::uint32_t both = is_aligned ? __ldg(reinterpret_cast<const unsigned short*>(place)) : __ldg(place);
    if (!is_aligned && has_second) both |= static_cast<std::uint32_t>(__ldg(place + 1)) << 8;
    pair[0] = (both & 255u) != 0 ? 0.0f : kMinusInfinity;
    pair[1] = both >> 8 != 0 ? 0.0f : kMinusInfinity;
  } else if constexpr (sizeof(Element) == 2) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(place);
    std::uint32_t both = is_aligned ? __ldg(reinterpret_cast<const std::uint32_t*>(place)) : __ldg(bits);
    if (!is_aligned && has_second) both |= static_cast<std::uint32_t>(__ldg(bits + 1)) << 16;
    pair[0] = in_powers_of_two(Cast<Element>::low(both));
    pair[1] = in_powers_of_two(Cast<Element>::high(both));
  } else {
    const float2 both = is_aligned ? __ldg(reinterpret_cast<const float2*>(place))
                                   : make_float2(__ldg(place), has_second ? __ldg(place + 1) : 0.0f);
    pair[0] = in_powers_of_two(both.x);
    pair[1] = in_powers_of_two(both.y);
  }
}

// Adds the mask to scores in powers of two. A key that a bool mask hides is hidden whatever its score.
template <typename Element, int kCount>
__device__ __forceinline__ void add_mask(const Params& params, const GroupRows& rows, std::uint32_t begin,
                                         float (&scores)[kCount]) {
  const Element* mask = static_cast<const Element*>(params.mask) + rows.batch(params) * params.mask_stride.batch +
                        rows.head(params) * params.mask_stride.head;
  const std::uint32_t thread = read_thread(), column = begin + thread % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t row = rows.of_thread(thread) + 8 * half;
    const Element* of_row = mask + (row < params.queries ? row : params.queries - 1) * params.mask_stride.row + column;
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
      const std::uint32_t first = column + 8 * n;
      if (first >= params.keys) continue;
      const bool has_second = first + 1 < params.keys;
      float pair[2];
      load_mask_pair(of_row + 8 * n, params.mask_is_aligned && has_second, has_second, pair);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[4 * n + 2 * half + e];
        score = sizeof(Element) == 1 && pair[e] == kMinusInfinity ? pair[e] : score + pair[e];
      }
    }
  }
}

// Products become scores in powers of two, scaled and capped.
template <int kCount>
__device__ __forceinline__ void scale_scores(const Params& params, float (&scores)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) scores[i] *= params.scale_log2;
  if (params.softcap_log2 == 0.0f) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) scores[i] = params.softcap_log2 * tanh_by_power(scores[i]);
}

// Hides keys beyond the last and, if attention is causal, beyond the row's own.
template <int kCount>
__device__ __forceinline__ void hide_keys(const Params& params, const GroupRows& rows, std::uint32_t begin,
                                          float (&scores)[kCount]) {
  const std::uint32_t thread = read_thread();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t row = rows.of_thread(thread) + 8 * half;
    const std::uint32_t end = params.is_causal && row + 1 < params.keys ? row + 1 : params.keys;
    const int left = static_cast<int>(end) - static_cast<int>(begin + thread % 4 * 2);
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * n + e >= left) scores[4 * n + 2 * half + e] = kMinusInfinity;
      }
    }
  }
}

// A tile that is more than products: returns what the scores are then still to be multiplied by.
template <typename Traits>
__device__ __forceinline__ float finish_scores(const WgmmaParams& params, const GroupRows& rows, std::uint32_t tile,
                                               float (&scores)[Traits::kKeys / 2]) {
  const Params& base = params.base;
  const std::uint32_t begin = tile * Traits::kKeys;
  float factor = base.scale_log2;
  if (params.scores_need_scaling || base.mask_kind != Mask::kNone) {
    scale_scores(base, scores);
    factor = 1.0f;
    if (base.mask_kind == Mask::kBool) add_mask<std::uint8_t>(base, rows, begin, scores);
    if (base.mask_kind == Mask::kTwoBytes) add_mask<typename Traits::T>(base, rows, begin, scores);
    if (base.mask_kind == Mask::kFloat32) add_mask<float>(base, rows, begin, scores);
  }
  hide_keys(base, rows, begin, scores);
  return factor;
}

// Largest of the scores of one of a thread's rows.
template <int kCount>
__device__ __forceinline__ float largest_of_thread(const float (&scores)[kCount], int half) {
  float a = fmaxf(scores[2 * half], scores[2 * half + 1]), b = fmaxf(scores[4 + 2 * half], scores[5 + 2 * half]);
#pragma unroll
  for (int n = 2; n < kCount / 4; n += 2) {
    a = fmaxf(a, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
    if (n + 1 < kCount / 4) b = fmaxf(b, fmaxf(scores[4 * n + 4 + 2 * half], scores[4 * n + 5 + 2 * half]));
  }
  return fmaxf(a, b);
}

// Rounded powers of the scores of a tile, as operand A of the second product: a step is 16 keys.
template <int kCount>
using Powers = std::uint32_t[kCount / 8][4];

// Two to the scores times `factor` minus `base`, of the steps from kBegin to kEnd; adds them to `sums`, two for each
// row.
template <typename T, int kBegin, int kEnd, int kCount, int kSteps>
__device__ __forceinline__ void raise(const float (&scores)[kCount], float factor, const float (&base)[2],
                                      std::uint32_t (&powers)[kSteps][4], float (&sums)[4]) {
#pragma unroll
  for (int i = 8 * kBegin; i < 8 * kEnd; i += 2) {
    const int half = i / 2 % 2;
    const float low = power_of_two(fmaf(scores[i], factor, -base[half]));
    const float high = power_of_two(fmaf(scores[i + 1], factor, -base[half]));
    sums[half] += low;
    sums[2 + half] += high;
    powers[i / 8][i / 2 % 4] = Cast<T>::pack(low, high);
  }
}

// Powers relative to what earlier ones are relative to are good as long as none is too large for its type and their
// sums are far from overflow. Then the largest score is not needed, and nothing found before is to be rescaled.
template <typename T>
__device__ __forceinline__ bool are_small(const float (&sums)[4]) {
  constexpr float kMost = std::is_same_v<T, __half> ? 16384.0f : 1.0e18f;
  return sums[0] + sums[2] < kMost && sums[1] + sums[3] < kMost;  // false if one is NaN
}

// Brings the rows' sums to the largest score of all; returns by what to multiply what was found before.
template <int kCount>
__device__ __forceinline__ void rebase(const float (&scores)[kCount], float factor, RowState& state,
                                       float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float tile = attention::largest_of_row(largest_of_thread(scores, half)) * factor;
    const float largest = fmaxf(state.largest[half], tile);
    rescale[half] = attention::weight_of(state.largest[half], largest);
    state.sum[half] *= rescale[half];
    state.largest[half] = largest;
  }
}

}  // namespace infuse::attention_forward
