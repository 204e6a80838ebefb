// The warp that brings blocks of queries to the warpgroups that multiply.
#pragma once

#include "attention_backward/wgmma_params.h"
#include "attention_backward/wgmma_traits.h"
#include "infuse/mbarrier.cuh"
#include "infuse/tma.cuh"

namespace infuse::attention_backward {

// A step of the loop over blocks of queries, as it is told to the warpgroups.
struct Step {
  std::uint32_t row;    // first, among all heads' padded rows
  std::uint32_t query;  // first
  std::uint32_t head;
  std::uint32_t flags;
};
constexpr std::uint32_t kBounds = 1, kReadMask = 2, kEnd = 4;

// Which block of keys of which head a CTA has. Blocks that many queries see come first.
struct Place {
  std::uint32_t batch, kv_head, key;

  __device__ __forceinline__ Place(const Params& params, std::uint32_t keys) {
    batch = params.kv_head_divisor.divide(blockIdx.x);
    kv_head = blockIdx.x - batch * params.kv_heads;
    key = blockIdx.y * keys;
  }
};

template <typename Sizes>
struct Barriers {
  SharedAddress base;
  __device__ SharedAddress keys() const { return base; }
  __device__ SharedAddress q_full(int stage) const { return base + 8 * (1 + stage); }
  __device__ SharedAddress q_empty(int stage) const { return base + 8 * (1 + Sizes::kStages + stage); }
  __device__ SharedAddress dout_full(int stage) const { return base + 8 * (1 + 2 * Sizes::kStages + stage); }
  __device__ SharedAddress dout_empty(int stage) const { return base + 8 * (1 + 3 * Sizes::kStages + stage); }

  __device__ void init() const {
    init_barrier(keys(), 1);
    for (int i = 0; i < Sizes::kStages; ++i) {
      init_barrier(q_full(i), 1);
      init_barrier(dout_full(i), 1);
      init_barrier(q_empty(i), 4 * Sizes::kGroups);  // a warp each
      init_barrier(dout_empty(i), 4 * Sizes::kGroups);
    }
    publish_barriers();
  }
};

__device__ __forceinline__ void load_row(SharedAddress shared, const float* source, std::uint32_t bytes,
                                         SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_step(SharedAddress shared, const Step& step) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(step.row), "r"(step.query),
               "r"(step.head), "r"(step.flags)
               : "memory");
}

__device__ __forceinline__ Step load_step(SharedAddress shared) {
  Step step;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(step.row), "=r"(step.query), "=r"(step.head), "=r"(step.flags)
               : "r"(shared)
               : "memory");
  return step;
}

// What the mask does to a block of queries and the CTA's keys.
template <typename Sizes>
__device__ __forceinline__ attention::TileState block_state(const Params& params, const Place& place,
                                                            std::uint32_t head, std::uint32_t query) {
  if (params.map.data == nullptr) return params.mask == nullptr ? attention::kOpen : attention::kMasked;
  const std::uint8_t* map = params.map.data + place.batch * params.map.batch + head * params.map.head;
  bool hidden = true, open = true;
#pragma unroll
  for (int i = 0; i < Sizes::kQueries; i += attention::kMapTile) {
#pragma unroll
    for (int j = 0; j < Sizes::kKeys; j += attention::kMapTile) {
      if (query + i >= params.queries || place.key + j >= params.keys) continue;
      const std::int64_t row = (query + i) / attention::kMapTile;
      const int state = map[row * params.map.columns + (place.key + j) / attention::kMapTile];
      hidden &= state == attention::kHidden;
      open &= state == attention::kOpen;
    }
  }
  return hidden ? attention::kHidden : open ? attention::kOpen : attention::kMasked;
}

template <typename Sizes>
__device__ __forceinline__ void load_keys(const WgmmaParams& params, const Place& place, SharedAddress shared,
                                          const Barriers<Sizes>& barriers) {
  arrive_expecting(barriers.keys(), 2 * Sizes::kKeyBytes);
#pragma unroll
  for (int half = 0; half < Sizes::kDim / 64; ++half) {
    load_box(shared + Sizes::kK + half * Sizes::kKeyHalf, params.k, barriers.keys(), L2::kNormal, half * 64, place.key,
             place.kv_head, place.batch);
    load_box(shared + Sizes::kV + half * Sizes::kKeyHalf, params.v, barriers.keys(), L2::kNormal, half * 64, place.key,
             place.kv_head, place.batch);
  }
}

template <typename Sizes>
__device__ __forceinline__ void load_queries(const WgmmaParams& params, const Place& place, const Step& step,
                                             SharedAddress shared, const Barriers<Sizes>& barriers,
                                             const RingPlace<Sizes::kStages>& ring) {
  const int stage = ring.stage;
  wait(barriers.q_empty(stage), ring.parity ^ 1);
  store_step(shared + Sizes::kSteps + Sizes::kStepBytes * stage, step);
  arrive_expecting(barriers.q_full(stage), Sizes::kQueryBytes + Sizes::kRowBytes);
#pragma unroll
  for (int half = 0; half < Sizes::kDim / 64; ++half) {
    load_box(shared + Sizes::kQ + stage * Sizes::kQueryBytes + half * Sizes::kQueryHalf, params.q,
             barriers.q_full(stage), L2::kNormal, half * 64, step.query, step.head, place.batch);
  }
  load_row(shared + Sizes::kLse + stage * Sizes::kRowBytes, params.common.lse_log2 + step.row, Sizes::kRowBytes,
           barriers.q_full(stage));
  wait(barriers.dout_empty(stage), ring.parity ^ 1);
  arrive_expecting(barriers.dout_full(stage), Sizes::kQueryBytes + Sizes::kRowBytes);
#pragma unroll
  for (int half = 0; half < Sizes::kDim / 64; ++half) {
    load_box(shared + Sizes::kDout + stage * Sizes::kQueryBytes + half * Sizes::kQueryHalf, params.dout,
             barriers.dout_full(stage), L2::kNormal, half * 64, step.query, step.head, place.batch);
  }
  load_row(shared + Sizes::kDelta + stage * Sizes::kRowBytes, params.common.delta + step.row, Sizes::kRowBytes,
           barriers.dout_full(stage));
}

// By one thread.
template <typename Sizes>
__device__ __forceinline__ void produce(const WgmmaParams& params, SharedAddress shared,
                                        const Barriers<Sizes>& barriers) {
  const Params& common = params.common;
  const Place place(common, Sizes::kKeys);
  load_keys(params, place, shared, barriers);
  RingPlace<Sizes::kStages> ring;
  const std::uint32_t first = common.is_causal ? place.key / Sizes::kQueries * Sizes::kQueries : 0;
  const bool ragged = place.key + Sizes::kKeys > common.keys;
  for (std::uint32_t i = 0; i < common.group.divisor; ++i) {
    const std::uint32_t head = place.kv_head * common.group.divisor + i;
    for (std::uint32_t query = first; query < common.queries; query += Sizes::kQueries) {
      const attention::TileState state = block_state<Sizes>(common, place, head, query);
      if (state == attention::kHidden) continue;
      const bool diagonal = common.is_causal && query + 1 < place.key + Sizes::kKeys;
      const std::uint32_t flags = (ragged || diagonal ? kBounds : 0) | (state == attention::kMasked ? kReadMask : 0);
      const std::uint32_t row = (place.batch * common.heads + head) * common.padded_queries + query;
      load_queries(params, place, Step{row, query, head, flags}, shared, barriers, ring);
      ring.advance();
    }
  }
  // Rows beyond the last one are zeros; the warpgroups start on them before they see that this is the end.
  const Step end{0, common.padded_queries, 0, kEnd};
  load_queries(params, place, end, shared, barriers, ring);
}

}  // namespace infuse::attention_backward
