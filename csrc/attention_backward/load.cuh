// From global to shared memory, in the background.
#pragma once

#include <cstdint>

#include "attention_backward/visits.cuh"

namespace infuse::attention_backward {

// kRows rows of a head from row `first` on; rows from `end` on and columns from `dim` on become zeros.
template <typename Traits, int kRows>
__device__ __forceinline__ void load_rows(const Place& place, const void* head, std::int64_t stride,
                                          std::uint32_t first, std::uint32_t end, std::uint32_t dim,
                                          SharedAddress to) {
  using T = typename Traits::T;
  constexpr std::uint32_t kPieces = Traits::kDim / 8, kLanes = kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;
  constexpr std::uint32_t kRowsAStep = Traits::kThreads / kLanes, kSteps = kRows / kRowsAStep;
  const std::uint32_t row = first + place.thread / kLanes, piece = place.thread % kLanes;
  if (kPieces < kLanes && piece >= kPieces) return;
  const T* from = static_cast<const T*>(head) + row * stride + piece * 8;
  const SharedAddress own = to + place.thread / kLanes * Traits::kRowBytes + piece * 16;
#pragma unroll
  for (std::uint32_t i = 0; i < kSteps; ++i, from += kRowsAStep * stride) {
    const bool valid = row + i * kRowsAStep < end && piece * 8 < dim;
    copy_async_or_zeros(own + i * kRowsAStep * Traits::kRowBytes, valid ? from : static_cast<const T*>(head), valid);
  }
}

template <typename T>
__device__ __forceinline__ const T* head_of(const void* tensor, const Strides& stride, std::uint32_t batch,
                                            std::uint32_t head) {
  return static_cast<const T*>(tensor) + batch * stride.batch + head * stride.head;
}

// The CTA's keys and values.
template <typename Traits>
__device__ __forceinline__ void load_keys(const Params& params, const Place& place) {
  using T = typename Traits::T;
  const std::uint32_t first = place.work.key_block * Traits::kKeys;
  load_rows<Traits, Traits::kKeys>(place, head_of<T>(params.k, params.k_stride, place.work.batch, place.work.kv_head),
                                   params.k_stride.row, first, params.keys, params.dim, place.k);
  load_rows<Traits, Traits::kKeys>(place, head_of<T>(params.v, params.v_stride, place.work.batch, place.work.kv_head),
                                   params.v_stride.row, first, params.keys, params.dim_v, place.v);
}

// A visit's rows of q and dout, and their lse and delta.
template <typename Traits>
__device__ __forceinline__ void load_queries(const Params& params, const Place& place, const Visit& visit) {
  using T = typename Traits::T;
  const SharedAddress to = place.stages + visit.stage() * Traits::kStageBytes;
  const std::uint32_t first = visit.block() * kQueryBlock;
  load_rows<Traits, kQueryBlock>(place, head_of<T>(params.q, params.q_stride, place.work.batch, visit.head),
                                 params.q_stride.row, first, params.queries, params.dim, to);
  load_rows<Traits, kQueryBlock>(place, head_of<T>(params.dout, params.dout_stride, place.work.batch, visit.head),
                                 params.dout_stride.row, first, params.queries, params.dim_v,
                                 to + Traits::kQueryBytes);
  constexpr std::uint32_t kPieces = kQueryBlock / 4;
  if (place.thread < 2 * kPieces) {
    const std::uint32_t piece = place.thread % kPieces;
    const std::uint32_t of_all = place.work.batch * params.heads + visit.head;
    const std::int64_t row = static_cast<std::int64_t>(of_all) * params.padded_queries;
    const float* from = (place.thread < kPieces ? params.lse_log2 : params.delta) + row + first + piece * 4;
    copy_async<16>(place.row_sums + visit.stage() * Traits::kRowSumBytes + place.thread * 16, from, true);
  }
}

}  // namespace infuse::attention_backward
