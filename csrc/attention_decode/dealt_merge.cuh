// The merge of what a CTA's groups and the splits found. In a cluster every CTA owns a share of the rows, and gets every
// CTA's sums for them written into its shared memory, with the bytes counted by a barrier there: one way, no reads of
// another CTA's memory to wait for.
#pragma once

#include <cstdint>

#include "attention_decode/merge.cuh"
#include "infuse/mbarrier.cuh"

namespace infuse::attention_decode {

// What the CTA gets of its rows.
struct Inbox {
  SharedAddress values, scalars;  // [splits, share, dim_v] and [splits, share, 2]
  SharedAddress barrier;
  std::uint32_t share, own;  // rows of any CTA, and of this one
};

__device__ __forceinline__ Inbox make_inbox(const Params& params, const Rows& rows, SharedAddress shared) {
  const std::uint32_t share = params.share.divisor, first = blockIdx.x * share;
  const std::uint32_t left = rows.count > first ? rows.count - first : 0;
  const SharedAddress values = shared + params.inbox_offset;
  return {values, values + params.splits * share * params.dim_v * 4, shared + params.barrier_offset, share,
          left < share ? left : share};
}

// By one thread, before the cluster is told that this CTA is ready.
__device__ __forceinline__ void open_inbox(const Params& params, const Inbox& inbox) {
  init_barrier(inbox.barrier, 1);
  publish_barriers();
  arrive_expecting(inbox.barrier, inbox.own * params.splits * (params.dim_v * 4 + 8));
}

// Four columns of row `row` of the CTA over its groups, each of which has its rows one behind the other.
template <typename Traits>
__device__ __forceinline__ Partial merge_own_groups(std::uint32_t groups, SharedAddress row, std::uint32_t column) {
  constexpr std::uint32_t kStep = Traits::kRowWarps * kWarpRows * kSumsBytes<Traits::kDim>;
  return merge_parts<kMaxDealtWarps / Traits::kRowWarps>(
      groups, [&](std::uint32_t group) { return load_two(row + group * kStep + Traits::kDim * 4); },
      [&](std::uint32_t group) { return load_four(row + group * kStep + column * 4); });
}

// Sends four columns of a row to the CTA that owns it.
__device__ __forceinline__ void send(const Params& params, const Inbox& inbox, std::uint32_t row, std::uint32_t column,
                                     const Partial& sum) {
  const std::uint32_t owner = params.share.divide(row);
  const std::uint32_t slot = blockIdx.x * inbox.share + row - owner * inbox.share;
  const SharedAddress barrier = shared_of_cta(inbox.barrier, owner);
  store_to_cluster(shared_of_cta(inbox.values + (slot * params.dim_v + column) * 4, owner), barrier,
                   make_float4(sum.out[0], sum.out[1], sum.out[2], sum.out[3]));
  if (column != 0) return;
  store_to_cluster(shared_of_cta(inbox.scalars + slot * 8, owner), barrier, make_float2(sum.largest, sum.denominator));
}

// Merges what the CTAs sent, and writes the results of the rows that this one owns.
template <typename Traits>
__device__ __forceinline__ void write_own(const Params& params, const Rows& rows, const Inbox& inbox) {
  if (inbox.own == 0) return;
  wait(inbox.barrier, 0);
  const std::uint32_t columns = params.dim_v / 4;
  for (std::uint32_t i = threadIdx.x; i < inbox.own * columns; i += blockDim.x) {
    const std::uint32_t row = i / columns, column = (i - row * columns) * 4;
    const Partial sum = merge_parts<kMaxCluster>(
        params.splits,
        [&](std::uint32_t rank) { return load_two(inbox.scalars + (rank * inbox.share + row) * 8); },
        [&](std::uint32_t rank) {
          return load_four(inbox.values + ((rank * inbox.share + row) * params.dim_v + column) * 4);
        });
    write_result<typename Traits::T>(params, rows.batch, rows.kv_head, blockIdx.x * inbox.share + row, column, sum);
  }
}

// All threads of the CTA, after the last tile. `memory`: where the rings were.
template <typename Traits>
__device__ __forceinline__ void merge_dealt(const Params& params, const Rows& rows, const Place& place,
                                            SharedAddress memory, const Inbox& inbox, Sums<Traits::kDim>& sums) {
  constexpr std::uint32_t kRowBytes = kSumsBytes<Traits::kDim>;
  constexpr int kBatch = Traits::kIsWarpgroup ? 4 : 1;  // rows that a warp reads before it sends
  __syncthreads();  // the rings are not needed any more
  const std::uint32_t first = place.row_warp * kWarpRows;
  publish<Traits>(place, memory + (place.group * Traits::kRowWarps + place.row_warp) * kWarpRows * kRowBytes,
                  rows.count > first ? rows.count - first : 0, sums);
  __syncthreads();
  const bool in_cluster = params.splits > 1 && params.part_out == nullptr;
  if (in_cluster) wait_for_cluster();
  const std::uint32_t warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (std::uint32_t column = place.lane * 4; column < params.dim_v; column += 4 * kWarpSize) {
#pragma unroll 1
    for (std::uint32_t row = warp * kBatch; row < rows.count; row += warps * kBatch) {
      Partial found[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        found[i] = merge_own_groups<Traits>(place.groups, memory + (row + i) * kRowBytes, column);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row + i >= rows.count) break;
        if (in_cluster) {
          send(params, inbox, row + i, column, found[i]);
        } else if (params.splits > 1) {
          keep_for_second_kernel(params, rows, row + i, column, found[i]);
        } else {
          write_result<typename Traits::T>(params, rows.batch, rows.kv_head, row + i, column, found[i]);
        }
      }
    }
  }
  if (in_cluster) write_own<Traits>(params, rows, inbox);
}

}  // namespace infuse::attention_decode
