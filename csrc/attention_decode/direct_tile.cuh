// A warp's arithmetic on 16 keys and at most 8 rows, whose operands come from global memory straight into registers.
//
// The products are those of the transposed problem, so that no row of a tensor-core tile is empty: scores [16 keys,
// 8 rows] = K q^T, and sums [16 columns, 8 rows] = V^T p^T. Columns change places on the way, the same in both operands
// of a product or in a result whose reader knows, so that each lane reads pieces of 16 bytes: of K and q the pieces
// lane % 4, lane % 4 + 4, .., of V the pieces lane / 4, lane / 4 + 8, ...
#pragma once

#include <cstdint>

#include "attention_decode/scores.cuh"
#include "attention_decode/tiles.cuh"
#include "infuse/memory.cuh"
#include "infuse/mma.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_decode {

template <typename T_, int kDim_, int kWarps_>
struct DirectTraits {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kWarps_;  // of a CTA
  static constexpr int kTile = 16;
  static constexpr int kPieces = kDim / 32;  // of a row of K or q, that a lane reads
  static constexpr int kBlocks = kDim / 64;  // of V's columns, of which a lane reads one piece each
  // On an SM. In 128 registers rows of 128 would spill.
  static constexpr int kMinCtas = kDim <= 64 && kWarps == kDirectWarps ? 2 : 1;
};

template <typename Traits>
using Piece = Vec<typename Traits::T, 8>;

// Of lane l: of K keys l / 4 and l / 4 + 8; of V keys 2 (l % 4), the next, and the same two plus 8.
template <typename Traits>
struct DirectTile {
  Piece<Traits> k[2][Traits::kPieces];
  Piece<Traits> v[4][Traits::kBlocks];
};

// Of lane l, sums of columns 64 b + 8 (l / 4) .. + 7 of rows 2 (l % 4) and the next: out[b][j] has columns 2 j of both
// rows, then columns 2 j + 1. largest: what a row's sums are relative to, in powers of two; denominator: over the keys of
// this lane.
template <typename Traits>
struct DirectSums {
  float out[Traits::kBlocks][4][4];
  float largest[2], denominator[2];
};

constexpr std::uint32_t kNothing = 0xffffffff;
constexpr std::uint32_t kAllOpen = 0xffff, kRowsDiffer = 0x10000;

// A tile, or kNothing. open: a bit for each key that a row of the mask opens, and kRowsDiffer where not all of them do.
struct OpenTile {
  std::uint32_t number, open;
};

// Where the lane's pieces of the K/V head's first tile lie, and its row of q.
template <typename T>
struct DirectSource {
  const T *k, *v, *q;
  bool has_row;
  std::uint32_t whole;  // tiles before this one have no key and no column beyond the last
};

template <typename Traits>
__device__ __forceinline__ void load_keys(const Params& params, const DirectSource<typename Traits::T>& source,
                                          std::uint32_t lane, std::uint32_t tile, DirectTile<Traits>& x) {
  const std::int64_t step = params.k_stride.row;
  const auto* row = source.k + tile * Traits::kTile * step;
  const auto load_all = [&](auto&& valid) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < Traits::kPieces; ++i) {
        x.k[half][i] = load<Reuse::kOnce, typename Traits::T, 8>(row + half * 8 * step + i * 32, valid(half * 8, i * 32));
      }
    }
  };
  if (tile < source.whole) return load_all([](int, int) { return true; });
  const std::uint32_t key = tile * Traits::kTile + lane / 4, column = lane % 4 * 8;
  load_all([&](int rows, int columns) { return key + rows < params.keys && column + columns < params.dim; });
}

template <typename Traits>
__device__ __forceinline__ void load_values(const Params& params, const DirectSource<typename Traits::T>& source,
                                            std::uint32_t lane, std::uint32_t tile, DirectTile<Traits>& x) {
  const std::int64_t step = params.v_stride.row;
  const auto* row = source.v + tile * Traits::kTile * step;
  const auto load_all = [&](auto&& valid) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rows = i % 2 + i / 2 * 8;
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) {
        x.v[i][b] = load<Reuse::kOnce, typename Traits::T, 8>(row + rows * step + b * 64, valid(rows, b * 64));
      }
    }
  };
  if (tile < source.whole) return load_all([](int, int) { return true; });
  const std::uint32_t key = tile * Traits::kTile + 2 * (lane % 4), column = lane / 4 * 8;
  load_all([&](int rows, int columns) { return key + rows < params.keys && column + columns < params.dim_v; });
}

template <typename Traits>
__device__ __forceinline__ void load_row(const Params& params, const DirectSource<typename Traits::T>& source,
                                         std::uint32_t lane, Piece<Traits> (&q)[Traits::kPieces]) {
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    const std::uint32_t column = lane % 4 * 8 + i * 32;
    q[i] = load<Reuse::kOnce, typename Traits::T, 8>(source.q + column, source.has_row && column < params.dim);
  }
}

// Scores of keys lane / 4 (the first two) and lane / 4 + 8, each for rows 2 (lane % 4) and the next.
template <typename Traits>
__device__ __forceinline__ void multiply_by_keys(const DirectTile<Traits>& x, const Piece<Traits> (&q)[Traits::kPieces],
                                                 float (&scores)[4]) {
  float sums[2][4] = {};  // two chains of products, each of which waits for the one before
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      const std::uint32_t keys[4] = {x.k[0][i].words[w], x.k[1][i].words[w], x.k[0][i].words[w + 1],
                                     x.k[1][i].words[w + 1]};
      mma_16x8x16<typename Traits::T>(sums[w / 2], keys, q[i].words[w], q[i].words[w + 1]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) scores[e] = sums[0][e] + sums[1][e];
}

// From products to scores in powers of two: scale, cap, mask, and nothing beyond the last key.
__device__ __forceinline__ void finish_direct(const Params& params, const Rows& rows, const MaskRows& mask,
                                              std::uint32_t lane, const OpenTile& tile, float (&scores)[4]) {
#pragma unroll
  for (float& score : scores) score *= params.scale_log2;
  if (params.softcap_log2 != 0.0f) [[unlikely]] {
#pragma unroll
    for (float& score : scores) score = params.softcap_log2 * hyperbolic_tangent(score);
  }
  const std::uint32_t first_key = tile.number * kDirectTile;
  if (tile.open == kAllOpen && !params.is_causal && first_key + kDirectTile <= params.keys) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const std::uint32_t of_tile = lane / 4 + e / 2 * 8, key = first_key + of_tile, row = 2 * (lane % 4) + e % 2;
    bool seen = key < params.keys && (tile.open >> of_tile & 1) != 0;
    if (params.is_causal) seen = seen && key <= params.group.divide(row);
    if (seen && (tile.open & kRowsDiffer) != 0) {
      seen = mask_row<std::uint8_t>(params, rows, mask.row_of(params, mask.slot_of(params, row)))[key] != 0;
    }
    if (!seen) scores[e] = kMinusInfinity;
  }
}

// Scores become probabilities relative to `largest`, which follows them only when they are far above it: the sums hold
// much more than 2^kSlack, and few tiles then pay for finding the largest score and for multiplying what was found.
template <typename Traits>
__device__ __forceinline__ void rebase_direct(float (&scores)[4], DirectSums<Traits>& sums) {
  constexpr float kSlack = 8.0f;
  bool far = false;
#pragma unroll
  for (int e = 0; e < 4; ++e) far |= scores[e] > sums.largest[e % 2] + kSlack;
  if (__any_sync(kFullMask, far)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = fmaxf(scores[r], scores[r + 2]);
#pragma unroll
      for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {  // those that hold other keys of the same rows
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, lanes));
      }
      largest = fmaxf(sums.largest[r], largest);
      const float factor = power_of_two(sums.largest[r] - (largest == kMinusInfinity ? 0.0f : largest));
      sums.largest[r] = largest;
      sums.denominator[r] *= factor;
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums.out[b][j][r] *= factor;
          sums.out[b][j][r + 2] *= factor;
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float base = sums.largest[e % 2];
    scores[e] = power_of_two(scores[e] - (base == kMinusInfinity ? 0.0f : base));
    sums.denominator[e % 2] += scores[e];
  }
}

__device__ __forceinline__ std::uint32_t transposed(std::uint32_t words) {
  std::uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(words));
  return result;
}

// out += values times probabilities, the probabilities rounded to T.
template <typename Traits>
__device__ __forceinline__ void multiply_by_values(const DirectTile<Traits>& x, const float (&scores)[4],
                                                   DirectSums<Traits>& sums) {
  using T = typename Traits::T;
  const std::uint32_t p[2] = {transposed(Cast<T>::pack(scores[0], scores[1])),
                              transposed(Cast<T>::pack(scores[2], scores[3]))};
#pragma unroll
  for (int b = 0; b < Traits::kBlocks; ++b) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      constexpr std::uint32_t kEven = 0x5410, kOdd = 0x7632;
      const std::uint32_t words[4] = {x.v[0][b].words[j], x.v[1][b].words[j], x.v[2][b].words[j], x.v[3][b].words[j]};
      const std::uint32_t values[4] = {__byte_perm(words[0], words[1], kEven), __byte_perm(words[0], words[1], kOdd),
                                       __byte_perm(words[2], words[3], kEven), __byte_perm(words[2], words[3], kOdd)};
      mma_16x8x16<T>(sums.out[b][j], values, p[0], p[1]);
    }
  }
}

}  // namespace infuse::attention_decode
