// What the parts of the kernel hand to one another.
#pragma once

#include <cstdint>

#include "attention_backward/params.h"
#include "attention_backward/plan.h"
#include "infuse/async_copy.cuh"
#include "infuse/reduce.cuh"

namespace infuse::attention_backward {

constexpr float kMinusInfinity = -__builtin_huge_valf();

// A CTA's warps are kKeyWarps times kQueryWarps. Of a block of scores, transposed, each has some of the keys and some
// of the queries; of dk and dv the same keys and some of the columns; of dq, kDqWarps times the rest, some of the
// queries and some of the columns.
template <typename T_, int kDim_, int kKeys_, int kKeyWarps_, int kQueryWarps_, int kDqWarps_>
struct Traits {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim of q, k and v is at most this
  static constexpr int kKeys = kKeys_;
  static constexpr int kKeyWarps = kKeyWarps_, kQueryWarps = kQueryWarps_, kWarps = kKeyWarps * kQueryWarps;
  static constexpr int kThreads = kWarps * kWarpSize, kCtas = 256 / kThreads;  // kCtas: of an SM
  static constexpr int kDqWarps = kDqWarps_, kDqColumnWarps = kWarps / kDqWarps;
  static constexpr int kRowBytes = row_bytes(kDim), kScoreRowBytes = row_bytes(kQueryBlock);
  static constexpr int kWarpKeys = kKeys / kKeyWarps, kWarpQueries = kQueryBlock / kQueryWarps;
  static constexpr int kWarpDims = kDim / kQueryWarps;
  static constexpr int kWarpDqRows = kQueryBlock / kDqWarps, kWarpDqDims = kDim / kDqColumnWarps;
  // In tensor-core tiles of 16 by 8.
  static constexpr int kKeyTiles = kWarpKeys / 16, kQueryTiles = kWarpQueries / 8, kDimTiles = kWarpDims / 8;
  static constexpr int kDqRowTiles = kWarpDqRows / 16, kDqDimTiles = kWarpDqDims / 8;
  static_assert(kKeyTiles >= 1 && kQueryTiles % 2 == 0 && kDimTiles % 2 == 0);
  static_assert(kDqRowTiles >= 1 && kDqDimTiles >= 2 && kDqDimTiles % 2 == 0);
  // Shared memory: K, V, P, dS, then two stages of lse and delta, then one or two of Q and dout.
  static constexpr int kKeyBytes = kKeys * kRowBytes, kQueryBytes = kQueryBlock * kRowBytes;
  static constexpr int kStageBytes = 2 * kQueryBytes, kRowSumBytes = 2 * kQueryBlock * 4;
};

// A CTA's part of the problem.
struct Work {
  std::uint32_t batch, kv_head, split, key_block;
};

// Of some heads at a time, whose q and dout stay in the L2 cache: first the keys that most queries see, if attention is
// causal. Where CTAs take turns, those go first that come to a block of queries first.
__device__ __forceinline__ Work work_of(const Params& params, std::uint32_t item) {
  const std::uint32_t heads = params.batch * params.kv_heads * params.splits;
  const std::uint32_t first = item / (params.heads_at_once * params.key_blocks) * params.heads_at_once;
  const std::uint32_t at_once = heads - first < params.heads_at_once ? heads - first : params.heads_at_once;
  const std::uint32_t of_first = item - first * params.key_blocks, key_block = of_first / at_once;
  const std::uint32_t with_split = first + of_first - key_block * at_once;
  const std::uint32_t of_all = params.split_divisor.divide(with_split);
  const std::uint32_t batch = params.kv_head_divisor.divide(of_all);
  return {batch, of_all - batch * params.kv_heads, with_split - of_all * params.splits,
          params.turns == nullptr ? key_block : params.key_blocks - 1 - key_block};
}

// Where a thread works.
struct Place {
  std::uint32_t thread, lane, key_warp, query_warp, dq_row_warp, dq_column_warp;
  Work work;
  SharedAddress k, v, stages, row_sums, probabilities, dscores;
};

// Computed anew wherever it is called, which the compiler does not know to give the same: all registers are taken.
template <typename Traits>
__device__ __forceinline__ Place place_of(const Params& params, SharedAddress work) {
  Place place{};
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(place.thread));
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(place.work.batch), "=r"(place.work.kv_head), "=r"(place.work.split), "=r"(place.work.key_block)
               : "r"(work)
               : "memory");
  const std::uint32_t warp = place.thread / kWarpSize;
  place.lane = place.thread % kWarpSize;
  place.key_warp = warp / Traits::kQueryWarps;
  place.query_warp = warp % Traits::kQueryWarps;
  place.dq_row_warp = warp / Traits::kDqColumnWarps;
  place.dq_column_warp = warp % Traits::kDqColumnWarps;
  place.k = dynamic_shared_memory();
  place.v = place.k + Traits::kKeyBytes;
  place.probabilities = place.v + Traits::kKeyBytes;
  place.dscores = place.probabilities + Traits::kKeys * Traits::kScoreRowBytes;
  place.row_sums = place.dscores + Traits::kKeys * Traits::kScoreRowBytes;
  place.stages = place.row_sums + 2 * Traits::kRowSumBytes;
  return place;
}

}  // namespace infuse::attention_backward
