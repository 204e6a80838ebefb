// Rotary embedding of rows, each normalised before if it is to be:
//
//   n = x * rsqrt(mean(x^2) + eps) * (weight_offset + weight)      RMSNorm, rounded to x's dtype as infuse::rms_norm does
//   y = n * cos + rotate(n) * sin                                   fp32; rotate: (n1, n2) -> (-n2, n1) in each pair
//
// A CTA is (lanes of a row, groups) and belongs to one part. A lane holds two vectors of a row: the same place of both
// halves, so that it has both elements of each of its pairs, be they halves or neighbours; behind the rotated elements
// two adjacent vectors. Memory-bound: x is read once, out written once, and the factors once for several heads.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/vec.cuh"
#include "rope/packed.cuh"
#include "rope/params.h"
#include "rope/plan.h"
#include "rope/rows.cuh"

namespace infuse::rope {

// How n * cos + rotate(n) * sin is computed: in fp32, or in X with every operation rounded to it.
enum class Arithmetic { kWide, kRounded };

template <typename X_, typename Factor_, Arithmetic kArithmetic_, int kHeads_, bool kNorm_>
struct Traits {
  using X = X_;
  using Factor = Factor_;  // of the tables: X or float
  static constexpr int kVecElems = kVectorBytes / static_cast<int>(sizeof(X));
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  static constexpr int kHeads = kHeads_;
  static constexpr bool kNorm = kNorm_;
};

// The two vectors of a lane, as offsets in a row.
struct Slot {
  std::uint32_t offset[2];
  bool valid[2];
  bool rotates;
};

template <int kVecElems>
__device__ __forceinline__ Slot slot_of_lane(const Params& params, const Part& part, bool has_item) {
  const std::uint32_t lane = threadIdx.x, half = params.rotary_dim / 2;
  Slot slot;
  slot.rotates = lane * kVecElems < half;
  if (slot.rotates) {
    slot.offset[0] = lane * kVecElems;
    slot.offset[1] = half + lane * kVecElems;
  } else {
    slot.offset[0] = params.rotary_dim + (lane - half / kVecElems) * 2 * kVecElems;
    slot.offset[1] = slot.offset[0] + kVecElems;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) slot.valid[i] = has_item && slot.offset[i] < params.dim;
  slot.rotates = slot.rotates && part.rotates;
  return slot;
}

// kElems factors from one address on, `step` apart.
template <typename Factor, int kElems>
__device__ __forceinline__ Vec<Factor, kElems> load_factors(const Params& params, const Factor* row, std::int64_t first,
                                                            std::int64_t step, bool valid) {
  if (params.table_vectors) return load<Reuse::kShared, Factor, kElems>(row + first, valid);
  float values[kElems];
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    const Vec<Factor, 1> one = load<Reuse::kShared, Factor, 1>(row + (first + i) * step, valid);
    float value[1];
    unpack(one, value);
    values[i] = value[0];
  }
  return pack<Factor>(values);
}

// The factors of a lane's two vectors, one for each element, in the order in which the elements need them.
template <typename Factor, int kElems>
__device__ __forceinline__ void load_table(const Params& params, const Table& table, Place place, const Slot& slot,
                                           bool swapped, Vec<Factor, kElems> (&factors)[2]) {
  const Factor* row = static_cast<const Factor*>(table.data) + place.outer * table.outer_stride +
                      place.inner * table.inner_stride;
  const bool valid = slot.rotates && slot.valid[0];
  if (params.per_pair && params.interleaved) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto half = load_factors<Factor, kElems / 2>(params, row, slot.offset[i] / 2, table.step, valid);
      float pairs[kElems / 2], values[kElems];
      unpack(half, pairs);
#pragma unroll
      for (int j = 0; j < kElems; ++j) values[j] = pairs[j / 2];
      factors[i] = pack<Factor>(values);
    }
    return;
  }
  const bool crosswise = swapped && !params.interleaved && !params.per_pair;
  const std::uint32_t first = crosswise ? slot.offset[1] : slot.offset[0];
  factors[0] = load_factors<Factor, kElems>(params, row, first, table.step, valid);
  if (params.per_pair) {
    factors[1] = factors[0];
    return;
  }
  const std::uint32_t second = crosswise ? slot.offset[0] : slot.offset[1];
  factors[1] = load_factors<Factor, kElems>(params, row, second, table.step, valid);
  if (swapped && params.interleaved) {
    factors[0] = swap_neighbours(factors[0]);
    factors[1] = swap_neighbours(factors[1]);
  }
}

// sin with the signs of the rotation: the first element of a pair gets minus its partner.
template <typename Factor, int kElems>
__device__ __forceinline__ void load_signed_sin(const Params& params, const Part& part, Place place, const Slot& slot,
                                                Vec<Factor, kElems> (&sin)[2]) {
  load_table(params, part.sin, place, slot, params.sin_of_partner, sin);
  flip_signs(sin[0], !params.inverse, params.interleaved == params.inverse);
  flip_signs(sin[1], params.interleaved != params.inverse, params.inverse);
}

template <typename X, int kElems>
__device__ __forceinline__ float sum_of_squares(const Vec<X, kElems> (&x)[2]) {
  float sums[2] = {};  // one alone would be a long chain of dependent additions
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    float values[kElems];
    unpack(x[v], values);
#pragma unroll
    for (int i = 0; i < kElems; ++i) sums[v] = fmaf(values[i], values[i], sums[v]);
  }
  return sums[0] + sums[1];
}

// y = n * cos + rotate(n) * sin of the lane's two vectors; sin has the signs.
template <Arithmetic kArithmetic, typename X, typename Factor, int kElems>
__device__ __forceinline__ void rotate(const Params& params, const Vec<Factor, kElems> (&cos)[2],
                                       const Vec<Factor, kElems> (&sin)[2], Vec<X, kElems> (&n)[2]) {
  const Vec<X, kElems> partner[2] = {params.interleaved ? swap_neighbours(n[0]) : n[1],
                                     params.interleaved ? swap_neighbours(n[1]) : n[0]};
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if constexpr (kArithmetic == Arithmetic::kRounded) {
      n[v] = add(multiply(n[v], cos[v]), multiply(partner[v], sin[v]));
    } else {
      float own[kElems], other[kElems], c[kElems], s[kElems];
      unpack(n[v], own);
      unpack(partner[v], other);
      unpack(cos[v], c);
      unpack(sin[v], s);
#pragma unroll
      for (int i = 0; i < kElems; ++i) own[i] = fmaf(own[i], c[i], other[i] * s[i]);
      n[v] = pack<X>(own);
    }
  }
}

template <typename Traits>
__global__ __launch_bounds__(kMaxThreads) void rope_kernel(const __grid_constant__ Params params) {
  using X = typename Traits::X;
  using Factor = typename Traits::Factor;
  constexpr int kVecElems = Traits::kVecElems;
  constexpr int kHeads = Traits::kHeads;

  const Part& part = part_of_cta(params);
  const std::uint32_t item = (blockIdx.x - part.first_cta) * blockDim.y + threadIdx.y;
  const bool has_item = item < part.items;
  const Place place = place_of_item(part, has_item ? item : 0);
  const Slot slot = slot_of_lane<kVecElems>(params, part, has_item);

  Vec<X, kVecElems> x[kHeads][2];
  const X* x_rows = static_cast<const X*>(part.x) + place.outer * part.x_stride[0] + place.inner * part.x_stride[1];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const std::uint32_t head = place.block * kHeads + h;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      x[h][v] = load<Reuse::kOnce, X, kVecElems>(x_rows + head * part.x_stride[2] + slot.offset[v],
                                                 slot.valid[v] && head < part.heads);
    }
  }
  Vec<Factor, kVecElems> cos[2], sin[2];
  load_table(params, part.cos, place, slot, false, cos);
  load_signed_sin(params, part, place, slot, sin);
  Scale<X, kVecElems> scale[2];
  float rstd[kHeads] = {};
  if constexpr (Traits::kNorm) {
#pragma unroll
    for (int v = 0; v < 2; ++v) scale[v].load(params, part, slot.offset[v], slot.valid[v]);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) rstd[h] = sum_of_squares(x[h]);
    sum_over_lanes(rstd);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      rstd[h] = reciprocal_std(params, rstd[h]);
#pragma unroll
      for (int v = 0; v < 2; ++v) keep_packed(x[h][v], params.zero);
    }
  }
  X* out_rows = static_cast<X*>(part.out) + out_offset(part, place);

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const std::uint32_t head = place.block * kHeads + h;
    if constexpr (Traits::kNorm) {
      if (part.has_norm) {
#pragma unroll
        for (int v = 0; v < 2; ++v) x[h][v] = scale[v].normalize(params, x[h][v], rstd[h]);
      }
    }
    if (slot.rotates) rotate<Traits::kArithmetic>(params, cos, sin, x[h]);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (slot.valid[v] && head < part.heads) {
        store(out_rows + head * part.out_stride[2] + slot.offset[v], x[h][v]);
      }
    }
  }
}

}  // namespace infuse::rope
