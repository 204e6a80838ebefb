// The merge within a cluster: every CTA owns a share of the results' pieces of four columns, and gets every CTA's sums
// for them written into its shared memory, with the bytes counted by a barrier there. One way, no waiting for reads.
#pragma once

#include <cstdint>

#include "attention_decode/merge.cuh"
#include "infuse/mbarrier.cuh"

namespace infuse::attention_decode {

// What CTA `rank` received or will receive of its share.
struct Inbox {
  SharedAddress values, scalars;  // [splits][share] of 16 and 8 bytes
  SharedAddress barrier;
  std::uint32_t share, own;  // pieces of any CTA, and of this one
};

__device__ __forceinline__ Inbox make_inbox(const Params& params, const Rows& rows, SharedAddress shared) {
  const std::uint32_t pieces = rows.count * (params.dim_v / 4), share = params.share.divisor;
  const std::uint32_t first = blockIdx.x * share, left = pieces > first ? pieces - first : 0;
  const SharedAddress values = shared + params.inbox_offset;
  return {values, values + params.splits * share * 16, shared + params.barrier_offset, share, left < share ? left : share};
}

// By one thread, before the cluster is told that this CTA is ready.
__device__ __forceinline__ void open_inbox(const Params& params, const Inbox& inbox) {
  init_barrier(inbox.barrier, 1);
  publish_barriers();
  arrive_expecting(inbox.barrier, inbox.own * params.splits * 24);
}

// Four columns of row `row` of the CTA over its groups, each of which has its rows one behind the other.
template <typename Traits>
__device__ __forceinline__ Partial merge_own_groups(std::uint32_t groups, SharedAddress row, std::uint32_t column) {
  constexpr std::uint32_t kStep = Traits::kRowWarps * kWarpRows * kSumsBytes<Traits::kDim>;
  return merge_parts<kMaxClusterWarps / Traits::kRowWarps>(
      groups, [&](std::uint32_t group) { return load_two(row + group * kStep + Traits::kDim * 4); },
      [&](std::uint32_t group) { return load_four(row + group * kStep + column * 4); });
}

// Sends a piece to the CTA that owns it.
__device__ __forceinline__ void send(const Params& params, const Inbox& inbox, std::uint32_t piece, const Partial& sum) {
  const std::uint32_t owner = params.share.divide(piece);
  const std::uint32_t slot = blockIdx.x * inbox.share + piece - owner * inbox.share;
  const SharedAddress barrier = shared_of_cta(inbox.barrier, owner);
  store_to_cluster(shared_of_cta(inbox.values + slot * 16, owner), barrier,
                   make_float4(sum.out[0], sum.out[1], sum.out[2], sum.out[3]));
  store_to_cluster(shared_of_cta(inbox.scalars + slot * 8, owner), barrier, make_float2(sum.largest, sum.denominator));
}

// Merges what the CTAs sent, and writes the results of the pieces that this one owns.
template <typename Traits>
__device__ __forceinline__ void write_own(const Params& params, const Rows& rows, const Inbox& inbox) {
  if (inbox.own == 0) return;
  wait(inbox.barrier, 0);
  const std::uint32_t columns = params.dim_v / 4;
  for (std::uint32_t i = threadIdx.x; i < inbox.own; i += blockDim.x) {
    const Partial sum = merge_parts<kMaxCluster>(
        params.splits,
        [&](std::uint32_t rank) { return load_two(inbox.scalars + (rank * inbox.share + i) * 8); },
        [&](std::uint32_t rank) { return load_four(inbox.values + (rank * inbox.share + i) * 16); });
    const std::uint32_t piece = blockIdx.x * inbox.share + i, row = piece / columns;
    write_result<typename Traits::T>(params, rows.batch, rows.kv_head, rows.first + row, (piece - row * columns) * 4, sum);
  }
}

// All threads of the CTA, after the last tile. `memory`: where the rings were.
template <typename Traits>
__device__ __forceinline__ void merge_cluster(const Params& params, const Rows& rows, const Place& place,
                                              SharedAddress memory, const Inbox& inbox, Sums<Traits::kDim>& sums) {
  constexpr std::uint32_t kRowBytes = kSumsBytes<Traits::kDim>;
  __syncthreads();  // the rings are not needed any more
  const std::uint32_t first = place.row_warp * kWarpRows;
  publish<Traits>(place, memory + (place.group * Traits::kRowWarps + place.row_warp) * kWarpRows * kRowBytes,
                  rows.count > first ? rows.count - first : 0, sums);
  __syncthreads();
  if (params.splits > 1) wait_for_cluster();
  const std::uint32_t columns = params.dim_v / 4;
  for (std::uint32_t i = threadIdx.x; i < rows.count * columns; i += blockDim.x) {
    const std::uint32_t row = i / columns, column = (i - row * columns) * 4;
    const Partial sum = merge_own_groups<Traits>(place.groups, memory + row * kRowBytes, column);
    if (params.splits > 1) {
      send(params, inbox, i, sum);
    } else {
      write_result<typename Traits::T>(params, rows.batch, rows.kv_head, rows.first + row, column, sum);
    }
  }
  if (params.splits > 1) write_own<Traits>(params, rows, inbox);
}

}  // namespace infuse::attention_decode
