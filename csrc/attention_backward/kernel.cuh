// The gradients of attention (Dao 2023):
//
//   S = cap(scale * q k^T) + mask, P = exp(S - lse), dS = P * (dout v^T - delta) * dcap
//   dv = P^T dout,  dk = scale * dS^T q,  dq = scale * dS k
//
// A CTA has some keys of one K/V head, in shared memory, and sums their dk and dv in registers over all blocks of 64
// queries of the heads that share them. What it finds for dq is added in fp32 to what other CTAs find. Scores are kept
// transposed, keys by queries, which is how a warp's registers hold the left operand of the products for dk and dv.
#pragma once

#include <cstdint>

#include "attention_backward/dq_tiles.cuh"
#include "attention_backward/load.cuh"
#include "attention_backward/products.cuh"
#include "attention_backward/scores.cuh"
#include "attention_backward/turns.cuh"
#include "infuse/overlap.cuh"

namespace infuse::attention_backward {

template <typename Traits>
using KeySums = Sums<Traits::kKeyTiles, Traits::kDimTiles>;

// dS k of a visit, added to the workspace. In passes over the columns, since dk and dv take most registers.
template <typename Traits>
__device__ __forceinline__ void add_dq(const Params& params, const Place& place, const Visit& visit) {
  constexpr int kColumns = Traits::kDqDimTiles % 4 == 0 ? 4 : Traits::kDqDimTiles;
  const std::uint32_t row = (place.work.batch * params.heads + visit.head) * params.padded_queries +
                            visit.block() * kQueryBlock + place.dq_row_warp * Traits::kWarpDqRows;
  float* first = params.dq_sum + dq_tile_offset(row / kTileRows, place.dq_column_warp * Traits::kDqDimTiles,
                                                Traits::kDim);
#pragma unroll
  for (int pass = 0; pass < Traits::kDqDimTiles; pass += kColumns) {
    Sums<Traits::kDqRowTiles, kColumns> sums;
    clear(sums);
    multiply_transposed<Traits>(sums, place.dscores + place.dq_row_warp * Traits::kWarpDqRows * 2,
                                place.k + place.dq_column_warp * Traits::kWarpDqDims * 2 + pass * 16, place.lane);
#pragma unroll
    for (int m = 0; m < Traits::kDqRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        add_to_dq_tile(first + (m * (Traits::kDim / 8) + pass + n) * kTileFloats, place.lane, sums[m][n]);
      }
    }
  }
}

// Leaves the scores of a visit and their gradient, P and dS, in shared memory.
template <typename Traits>
__device__ __forceinline__ void find_scores(const Params& params, const Place& place, const Visit& visit) {
  const SharedAddress q = place.stages + visit.stage() * Traits::kStageBytes, dout = q + Traits::kQueryBytes;
  const std::uint32_t key_offset = place.key_warp * Traits::kWarpKeys * Traits::kRowBytes;
  const std::uint32_t query_offset = place.query_warp * Traits::kWarpQueries * Traits::kRowBytes;
  const Corner corner = corner_of<Traits>(place, visit);
  const std::uint32_t drawn = params.dropout.seed != nullptr ? draw<Traits>(params, place, visit, corner) : 0;
  Scores<Traits> scores, dscores;
  clear(scores);
  multiply_rows<Traits>(scores, place.k + key_offset, q + query_offset, place.lane);
  start_dscores<Traits>(params, corner, dscores);
  multiply_rows<Traits>(dscores, place.v + key_offset, dout + query_offset, place.lane);
  differentiate<Traits>(params, place, visit, corner, drawn, scores, dscores);
  share_scores<Traits>(place, place.probabilities, scores);
  share_scores<Traits>(place, place.dscores, dscores);
}

// What a visit adds to dk and dv.
template <typename Traits>
__device__ __forceinline__ void add_key_sums(const Place& place, const Visit& visit, KeySums<Traits>& dk,
                                             KeySums<Traits>& dv) {
  const SharedAddress q = place.stages + visit.stage() * Traits::kStageBytes, dout = q + Traits::kQueryBytes;
  const std::uint32_t key_offset = place.key_warp * Traits::kWarpKeys * Traits::kScoreRowBytes;
  const std::uint32_t dim_offset = place.query_warp * Traits::kWarpDims * 2;
  multiply_scores<Traits>(dv, place.probabilities + key_offset, dout + dim_offset, place.lane);
  multiply_scores<Traits>(dk, place.dscores + key_offset, q + dim_offset, place.lane);
}

// A lane's sums of dk or dv: rounded, or as part of the sum over splits.
template <typename Traits>
__device__ __forceinline__ void store_sums(const Params& params, const Place& place, const KeySums<Traits>& sums,
                                           float factor, std::uint32_t dim, void* result, const Strides& stride,
                                           float* parts) {
  using T = typename Traits::T;
  T* head = static_cast<T*>(result) + place.work.batch * stride.batch + place.work.kv_head * stride.head;
  const std::uint32_t of_batches = place.work.split * params.batch + place.work.batch;
  const std::int64_t of_all = static_cast<std::int64_t>(of_batches) * params.kv_heads + place.work.kv_head;
  const std::uint32_t first_column = place.query_warp * Traits::kWarpDims + place.lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t key = place.work.key_block * Traits::kKeys + place.key_warp * Traits::kWarpKeys + m * 16 +
                                place.lane / 4 + 8 * half;
      if (key >= params.keys) continue;
      T* row = head + key * stride.row + first_column;
      float* part = parts + (of_all * params.keys + key) * dim + first_column;
#pragma unroll
      for (int n = 0; n < Traits::kDimTiles; ++n) {
        if (first_column + n * 8 >= dim) continue;
        const float low = sums[m][n][2 * half] * factor, high = sums[m][n][2 * half + 1] * factor;
        if (params.dk_parts != nullptr) {
          *reinterpret_cast<float2*>(part + n * 8) = make_float2(low, high);
        } else {
          *reinterpret_cast<std::uint32_t*>(row + n * 8) = Cast<T>::pack(low, high);
        }
      }
    }
  }
}

// All visits of a CTA. The next visit's rows arrive while this one is worked on: of two stages, from its beginning on;
// of one, while dq is computed.
template <typename Traits>
__device__ __forceinline__ void visit_all(const Params& params, SharedAddress work, KeySums<Traits>& dk,
                                          KeySums<Traits>& dv) {
  const Place start = place_of<Traits>(params, work);
  Visits<Traits::kKeys> visits(params, start);
  bool has_more = visits.next(params, start);
  load_keys<Traits>(params, start);
  if (has_more) load_queries<Traits>(params, start, visits.current());
  end_copy_group();
  const bool in_turns = params.turns != nullptr;
  __shared__ std::uint32_t* turn;  // to be passed; one thread's own
  if (threadIdx.x == 0) turn = nullptr;
#pragma unroll 1
  while (has_more) {
    const Visit visit = visits.current();
    const Place of_scores = place_of<Traits>(params, work);
    wait_for_copies<0>();
    __syncthreads();  // the visit's rows are there for all, and what the one before has left is read by none
    has_more = visits.next(params, of_scores);
    if (has_more && params.stages == 2) {
      load_queries<Traits>(params, of_scores, visits.current());
      end_copy_group();
    }
    find_scores<Traits>(params, of_scores, visit);
    const Place place = place_of<Traits>(params, work);
    if (in_turns && threadIdx.x < kWarpSize) wait_for_turn<Traits::kKeys>(params, place, visit);
    __syncthreads();  // the scores are there for all
    if (in_turns && threadIdx.x == 0) {
      if (turn != nullptr) pass_turn(turn);
      turn = turn_of(params, place, visit);
    }
    add_key_sums<Traits>(place, visit, dk, dv);
    if (has_more && params.stages == 1) {
      __syncthreads();  // the visit's rows are read by none
      load_queries<Traits>(params, place, visits.current());
      end_copy_group();
    }
    add_dq<Traits>(params, place, visit);
  }
  if (!in_turns) return;
  __syncthreads();
  if (threadIdx.x == 0 && turn != nullptr) pass_turn(turn);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    mma_kernel(const __grid_constant__ Params params) {
  __shared__ __align__(16) Work shared_work;
  wait_for_previous_kernel();
  if (threadIdx.x == 0) shared_work = work_of(params, draw_item(params));
  __syncthreads();
  const auto work = static_cast<SharedAddress>(__cvta_generic_to_shared(&shared_work));
  KeySums<Traits> dk, dv;
  clear(dk);
  clear(dv);
  visit_all<Traits>(params, work, dk, dv);
  wait_for_copies<0>();  // of a CTA without visits
  let_next_kernel_start();
  const Place place = place_of<Traits>(params, work);
  store_sums<Traits>(params, place, dk, params.scale, params.dim, params.dk, params.dk_stride, params.dk_parts);
  store_sums<Traits>(params, place, dv, 1.0f, params.dim_v, params.dv, params.dv_stride, params.dv_parts);
}

}  // namespace infuse::attention_backward
