// x of at most 8 rows, normalised by every CTA for itself and kept in shared memory as an operand of its products:
// pieces of 16 bytes, those of all rows for 8 columns behind one another. Rows that do not exist take no place: the
// products read other columns' instead, and nobody reads their results.
#pragma once

#include <cstdint>

#include "infuse/barrier.cuh"
#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"
#include "infuse/vec.cuh"
#include "skinny_linear/params.h"
#include "skinny_linear/plan.h"
#include "skinny_linear/result.cuh"

namespace infuse::skinny_linear {

constexpr int kKeptAhead = 4;  // pieces of x, and of the residual, that a thread loads before it uses them

struct KeptSums {
  float of_warp[kRingWarps][kMaxKeptRows];
};

// The part of a thread: one row of x, and every `step`-th piece of it, which lies among those of `rows` rows.
struct KeptPart {
  std::uint32_t row, rows, place, first, step, row_lanes;
  bool exists, writes_sum;

  __device__ __forceinline__ SharedAddress of(SharedAddress kept, std::uint32_t piece) const {
    return kept + (piece * rows + place) * 16;
  }
};

__device__ __forceinline__ KeptPart kept_part(const Params& params, std::uint32_t thread, std::uint32_t threads) {
  const std::uint32_t lanes = params.rows > 4 ? 8 : params.rows > 2 ? 4 : params.rows;  // powers of two
  const std::uint32_t row = thread & (lanes - 1);
  const bool exists = row < params.rows;
  return {exists ? row : 0, params.rows, row, thread / lanes, threads / lanes, lanes, exists,
          row % gridDim.x == blockIdx.x};
}

// The norm's weight comes first: it depends on no kernel before this one. The caller waits for the copies.
__device__ __forceinline__ void fetch_norm_weight(const Params& params, SharedAddress shared, std::uint32_t thread,
                                                  std::uint32_t threads) {
  if (params.norm.weight == nullptr) return;
  const std::uint32_t pieces = params.dim / (params.norm.weight_is_fp32 ? 4 : 8);
  for (std::uint32_t i = thread; i < pieces; i += threads) {
    copy_async<16>(shared + i * 16, static_cast<const char*>(params.norm.weight) + i * 16, true);
  }
}

// x, or the rounded x + residual, which one CTA also writes: into shared memory as it is. Returns the thread's squares.
template <typename T>
__device__ __forceinline__ float keep_sums(const Params& params, const KeptPart& part, SharedAddress kept) {
  using Piece = Vec<T, 8>;
  const std::uint32_t pieces = params.dim / 8;
  const T* x = static_cast<const T*>(params.x) + part.row * params.x_stride;
  const T* residual = static_cast<const T*>(params.norm.residual) + part.row * params.norm.residual_stride;
  const bool has_residual = params.norm.residual != nullptr;
  const bool writes_sum = params.norm.sum != nullptr && part.writes_sum;
  float squares = 0.0f;
  for (std::uint32_t first = part.first; first < pieces; first += kKeptAhead * part.step) {
    Piece own[kKeptAhead], other[kKeptAhead];
#pragma unroll
    for (int i = 0; i < kKeptAhead; ++i) {
      const std::uint32_t piece = first + i * part.step;
      own[i] = load<Reuse::kOnce, T, 8>(x + piece * 8, part.exists && piece < pieces);
      other[i] = load<Reuse::kOnce, T, 8>(residual + piece * 8, part.exists && has_residual && piece < pieces);
    }
#pragma unroll
    for (int i = 0; i < kKeptAhead; ++i) {
      const std::uint32_t piece = first + i * part.step;
      float h[8], added[8];
      unpack(own[i], h);
      if (has_residual) {
        unpack(other[i], added);
#pragma unroll
        for (int j = 0; j < 8; ++j) h[j] += added[j];
        own[i] = pack<T>(h);
        unpack(own[i], h);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) squares = fmaf(h[j], h[j], squares);
      if (!part.exists || piece >= pieces) continue;
      store_shared(part.of(kept, piece), own[i]);
      if (writes_sum) store(static_cast<T*>(params.norm.sum) + std::size_t{part.row} * params.dim + piece * 8, own[i]);
    }
  }
  return squares;
}

// x as it is, in the background.
template <typename T>
__device__ __forceinline__ void copy_kept(const Params& params, const KeptPart& part, SharedAddress kept) {
  const T* x = static_cast<const T*>(params.x) + part.row * params.x_stride;
  for (std::uint32_t piece = part.first; piece < params.dim / 8; piece += part.step) {
    copy_async<16>(part.of(kept, piece), x + piece * 8, part.exists);
  }
  end_copy_group();
}

// Zeros behind the last column, as far as the stages of weights reach.
template <typename T>
__device__ __forceinline__ void clear_rest(const Params& params, const KeptPart& part, SharedAddress kept) {
  const std::uint32_t end = params.iterations * params.blocks * (kBlockColumns / 8);
  for (std::uint32_t piece = params.dim / 8 + part.first; piece < end; piece += part.step) {
    if (part.exists) store_shared(part.of(kept, piece), Vec<T, 8>{});
  }
}

// From the row's squares to its reciprocal root mean square. All kRingWarps warps take part; `sync` waits for them.
template <typename Sync>
__device__ __forceinline__ float rstd_of(const Params& params, const KeptPart& part, float squares, KeptSums& sums,
                                         std::uint32_t thread, Sync&& sync) {
  for (std::uint32_t offset = 16; offset >= part.row_lanes; offset /= 2) {
    squares += __shfl_xor_sync(kFullMask, squares, offset);
  }
  if (thread % kWarpSize < part.row_lanes) sums.of_warp[thread / kWarpSize][part.place] = squares;
  sync();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kRingWarps; ++warp) sum += sums.of_warp[warp][part.place];
  return reciprocal_rms(params, sum);
}

// 8 values of the norm's weight, as they are multiplied.
template <typename T>
__device__ __forceinline__ void load_scale(const Params& params, SharedAddress weight, std::uint32_t piece,
                                           float (&scale)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) scale[j] = 0.0f;
  if (params.norm.weight != nullptr) {
    if (params.norm.weight_is_fp32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vec<float, 4> words = load_shared<float, 4>(weight + piece * 32 + half * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) scale[half * 4 + j] = __uint_as_float(words.words[j]);
      }
    } else {
      unpack(load_shared<T, 8>(weight + piece * 16), scale);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) scale[j] += params.norm.weight_offset;
}

// Normalises the thread's pieces of x and gives each to `put`.
template <typename T, typename Put>
__device__ __forceinline__ void normalise_kept(const Params& params, const KeptPart& part, float rstd,
                                               SharedAddress kept, SharedAddress weight, Put&& put) {
  const std::uint32_t pieces = params.dim / 8;
  if (!part.exists) return;
#pragma unroll 2
  for (std::uint32_t piece = part.first; piece < pieces; piece += part.step) {
    float h[8], scale[8];
    unpack(load_shared<T, 8>(part.of(kept, piece)), h);
    load_scale<T>(params, weight, piece, scale);
#pragma unroll
    for (int j = 0; j < 8; ++j) h[j] *= rstd;
    if (params.norm.cast_before_weight) round_through<T>(h);
#pragma unroll
    for (int j = 0; j < 8; ++j) h[j] *= scale[j];
    put(piece, pack<T>(h));
  }
}

// By the threads that multiply: x into shared memory, normalised if there is a norm.
template <typename T>
__device__ __forceinline__ void keep_x(const Params& base, SharedAddress shared, KeptSums& storage,
                                       std::uint32_t threads) {
  const KeptPart part = kept_part(base, threadIdx.x, threads);
  const SharedAddress kept = shared + base.kept_x_offset, weight = shared + base.norm_weight_offset;
  const auto sync = [&] { sync_group(0, static_cast<int>(threads)); };
  clear_rest<T>(base, part, kept);
  if (!base.norm.exists) {
    wait_for_previous_kernel();
    copy_kept<T>(base, part, kept);
    wait_for_copies<0>();
    sync();
    return;
  }
  fetch_norm_weight(base, weight, threadIdx.x, threads);
  end_copy_group();
  wait_for_previous_kernel();
  const float squares = keep_sums<T>(base, part, kept);
  wait_for_copies<0>();
  const float rstd = rstd_of(base, part, squares, storage, threadIdx.x, sync);
  const auto put = [&](std::uint32_t piece, const Vec<T, 8>& y) { store_shared(part.of(kept, piece), y); };
  normalise_kept<T>(base, part, rstd, kept, weight, put);
  sync();
}

}  // namespace infuse::skinny_linear
