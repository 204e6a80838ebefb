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
#include "infuse/overlap.cuh"
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
  // Registers for as many warps at once as there can be without spills. With no bound the compiler widens all heads to
  // fp32 at once.
  static constexpr int kWarps = kArithmetic == Arithmetic::kRounded ? (kHeads == 1 ? 32 : kHeads == 2 ? 24 : 16)
                                                                    : (kHeads == 1 ? 20 : kHeads == 2 ? 16 : 12);
  static constexpr int kMinCtas = kWarps * kWarpLanes / kMaxThreads;
};

// The two vectors of a lane, as offsets in a row.
struct Slot {
  std::uint32_t offset[2];
  bool valid[2];
  bool rotates;
};

template <int kVecElems>
__device__ __forceinline__ Slot slot_of_lane(const Params& params, const Part& part, std::uint32_t lane,
                                             bool has_item) {
  const std::uint32_t half = params.rotary_dim / 2;
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

// kCount vectors of each table: those of cos begin at `first`, those of sin at `first_of_sin` in their rows. All loads
// stand before what is done with them, so that they are in flight together.
template <typename Factor, int kElems, int kCount>
__device__ __forceinline__ void load_factors(const Params& params, const Factor* cos_row, const Factor* sin_row,
                                             const std::uint32_t (&first)[kCount],
                                             const std::uint32_t (&first_of_sin)[kCount], bool valid,
                                             Vec<Factor, kElems>* cos, Vec<Factor, kElems>* sin) {
  if (!params.zipped_tables) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) cos[v] = load<Reuse::kShared, Factor, kElems>(cos_row + first[v], valid);
#pragma unroll
    for (int v = 0; v < kCount; ++v) sin[v] = load<Reuse::kShared, Factor, kElems>(sin_row + first_of_sin[v], valid);
    return;
  }
  Vec<Factor, 2 * kElems> zipped[kCount];
#pragma unroll
  for (int v = 0; v < kCount; ++v) zipped[v] = load<Reuse::kShared, Factor, 2 * kElems>(cos_row + 2 * first[v], valid);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    float both[2 * kElems], cos_values[kElems], sin_values[kElems];
    unpack(zipped[v], both);
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      cos_values[i] = both[2 * i];
      sin_values[i] = both[2 * i + 1];
    }
    cos[v] = pack<Factor>(cos_values);
    sin[v] = pack<Factor>(sin_values);
  }
}

// Each of kElems / 2 factors twice.
template <typename Factor, int kElems>
__device__ __forceinline__ Vec<Factor, kElems> doubled(const Vec<Factor, kElems / 2>& factors) {
  float pairs[kElems / 2], values[kElems];
  unpack(factors, pairs);
#pragma unroll
  for (int i = 0; i < kElems; ++i) values[i] = pairs[i / 2];
  return pack<Factor>(values);
}

// The factors of a lane's two vectors, one for each element; sin as it lies in the table.
template <typename Factor, int kElems>
__device__ __forceinline__ void load_tables(const Params& params, const Part& part, Place place, const Slot& slot,
                                            Vec<Factor, kElems> (&cos)[2], Vec<Factor, kElems> (&sin)[2]) {
  const Factor* cos_row = static_cast<const Factor*>(part.cos.data) + place.outer * part.cos.outer_stride +
                          place.inner * part.cos.inner_stride;
  const Factor* sin_row = static_cast<const Factor*>(part.sin.data) + place.outer * part.sin.outer_stride +
                          place.inner * part.sin.inner_stride;
  const bool valid = slot.rotates && slot.valid[0];
  if (params.per_pair && params.interleaved) {
    const std::uint32_t firsts[2] = {slot.offset[0] / 2, slot.offset[1] / 2};
    Vec<Factor, kElems / 2> half_cos[2], half_sin[2];
    load_factors(params, cos_row, sin_row, firsts, firsts, valid, half_cos, half_sin);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      cos[v] = doubled<Factor, kElems>(half_cos[v]);
      sin[v] = doubled<Factor, kElems>(half_sin[v]);
    }
  } else if (params.per_pair) {
    const std::uint32_t first[1] = {slot.offset[0]};
    load_factors(params, cos_row, sin_row, first, first, valid, cos, sin);
    cos[1] = cos[0];
    sin[1] = sin[0];
  } else {
    const bool crosswise = params.sin_of_partner && !params.interleaved;
    const std::uint32_t firsts[2] = {crosswise ? slot.offset[1] : slot.offset[0],
                                     crosswise ? slot.offset[0] : slot.offset[1]};
    load_factors(params, cos_row, sin_row, slot.offset, firsts, valid, cos, sin);
  }
}

// Gives sin the signs of the rotation: the first element of a pair gets minus its partner. Apart from the loads, which
// even an instruction that is predicated off would wait for.
template <typename Factor, int kElems>
__device__ __forceinline__ void finish_tables(const Params& params, Vec<Factor, kElems> (&sin)[2]) {
  if (params.sin_of_partner && params.interleaved && !params.per_pair) {
    sin[0] = swap_neighbours(sin[0]);
    sin[1] = swap_neighbours(sin[1]);
  }
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
template <Arithmetic kArithmetic, bool kInterleaved, typename X, typename Factor, int kElems>
__device__ __forceinline__ void rotate(const Vec<Factor, kElems> (&cos)[2], const Vec<Factor, kElems> (&sin)[2],
                                       Vec<X, kElems> (&n)[2]) {
  const Vec<X, kElems> partner[2] = {kInterleaved ? swap_neighbours(n[0]) : n[1],
                                     kInterleaved ? swap_neighbours(n[1]) : n[0]};
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

// A lane's vectors of kHeads neighbouring heads. The branches of its functions are the same for all heads, and stand
// outside of the loops over them, so that the heads' instructions mix.
template <typename Traits>
struct Heads {
  using X = typename Traits::X;
  static constexpr int kVecElems = Traits::kVecElems;
  static constexpr int kHeads = Traits::kHeads;
  Vec<X, kVecElems> x[kHeads][2];

  // heads: how many there are, from `row` on.
  __device__ __forceinline__ void load(const X* row, std::int64_t stride, const Slot& slot, std::uint32_t heads) {
#pragma unroll
    for (std::uint32_t h = 0; h < kHeads; ++h, row += stride) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        x[h][v] = infuse::load<Reuse::kOnce, X, kVecElems>(row + slot.offset[v], slot.valid[v] && h < heads);
      }
    }
  }

  __device__ __forceinline__ void store(X* row, std::int64_t stride, const Slot& slot, std::uint32_t heads) const {
#pragma unroll
    for (std::uint32_t h = 0; h < kHeads; ++h, row += stride) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (slot.valid[v] && h < heads) infuse::store(row + slot.offset[v], x[h][v]);
      }
    }
  }

  __device__ __forceinline__ void normalize(const Params& params, const Scale<X, kVecElems> (&scale)[2]) {
    float rstd[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) rstd[h] = sum_of_squares(x[h]);
    sum_over_lanes(rstd);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      rstd[h] = reciprocal_std(params, rstd[h]);
#pragma unroll
      for (int v = 0; v < 2; ++v) keep_packed(x[h][v], params.zero);
    }
    if (Scale<X, kVecElems>::is_packed(params)) {
      normalize_by<true>(scale, rstd);
    } else {
      normalize_by<false>(scale, rstd);
    }
  }

  template <typename Factor>
  __device__ __forceinline__ void rotate(const Params& params, const Vec<Factor, kVecElems> (&cos)[2],
                                         const Vec<Factor, kVecElems> (&sin)[2]) {
    if (params.interleaved) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) rope::rotate<Traits::kArithmetic, true>(cos, sin, x[h]);
    } else {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) rope::rotate<Traits::kArithmetic, false>(cos, sin, x[h]);
    }
  }

 private:
  template <bool kPacked>
  __device__ __forceinline__ void normalize_by(const Scale<X, kVecElems> (&scale)[2], const float (&rstd)[kHeads]) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int v = 0; v < 2; ++v) x[h][v] = scale[v].template normalize<kPacked>(x[h][v], rstd[h]);
    }
  }
};

template <typename Traits>
__global__ __launch_bounds__(kMaxThreads, Traits::kMinCtas) void rope_kernel(const __grid_constant__ Params params) {
  using X = typename Traits::X;
  using Factor = typename Traits::Factor;
  constexpr int kVecElems = Traits::kVecElems;
  constexpr int kHeads = Traits::kHeads;

  const Part& part = part_of_cta(params);
  const std::uint32_t item = (blockIdx.x - part.first_cta) * blockDim.y + threadIdx.y;
  const bool has_item = item < part.items;
  const Place place = place_of_item(part, has_item ? item : 0);
  const Slot slot = slot_of_lane<kVecElems>(params, part, threadIdx.x, has_item);
  const std::uint32_t head = place.block * kHeads * params.batches;
  std::uint32_t heads = part.heads - head;  // from the first of this batch on

  let_next_kernel_start();  // what follows in a decoder has weights or keys to fetch meanwhile
  wait_for_previous_kernel();
  const X* x_row = row_at<const X>(part.x, part.x_stride, place, head);
  Heads<Traits> rows;
  rows.load(x_row, part.x_stride[2], slot, heads);
  Vec<Factor, kVecElems> cos[2], sin[2];
  load_tables(params, part, place, slot, cos, sin);
  Scale<X, kVecElems> scale[2];
  if constexpr (Traits::kNorm) {
#pragma unroll
    for (int v = 0; v < 2; ++v) scale[v].load(params, part, slot.offset[v], slot.valid[v]);
  }
  X* out_row = static_cast<X*>(part.out) + out_offset(part, place) + head * part.out_stride[2];
  if constexpr (Traits::kNorm) {
#pragma unroll
    for (int v = 0; v < 2; ++v) scale[v].finish(params, part);
  }
  finish_tables(params, sin);

  for (std::uint32_t batch = 0;;) {
    if constexpr (Traits::kNorm) {
      if (part.has_norm) rows.normalize(params, scale);
    }
    if (slot.rotates) rows.rotate(params, cos, sin);
    rows.store(out_row, part.out_stride[2], slot, heads);
    // The last block of a row may have fewer batches; all lanes of a warp go on, because they meet in shuffles.
    if (++batch == params.batches) break;
    heads = heads > kHeads ? heads - kHeads : 0;
    x_row += kHeads * part.x_stride[2];
    out_row += kHeads * part.out_stride[2];
    rows.load(x_row, part.x_stride[2], slot, heads);
  }
}

}  // namespace infuse::rope
