// Attention of many query rows with mma.sync, for every device, head dimension and feature:
//
//   out = dropout(softmax(cap(scale * q k^T) + mask)) v
//
// FlashAttention-2 (Dao 2023): a CTA has up to 256 rows of one head, each warp 16 or 32 of them, and goes through the
// tiles of 64 keys that the mask lets any of its rows see. Scores, softmax and sums stay in registers, in fp32; tiles
// of K and V come by cp.async while the one before is worked on. Grouped heads read the same K and V, which are never
// expanded. Several splits of the keys are merged by a second kernel.
#pragma once

#include <cstdint>

#include "attention_forward/mma_load.cuh"
#include "attention_forward/mma_products.cuh"
#include "attention_forward/mma_scores.cuh"
#include "attention_forward/mma_tiles.cuh"
#include "attention_forward/result.cuh"
#include "infuse/overlap.cuh"

namespace infuse::attention_forward {

// Whether a row of the warp sees a key of the tile.
template <typename Traits>
__device__ __forceinline__ bool sees(const Params& params, Visit visit) {
  return visit.is_seen() && (!params.is_causal || visit.tile() * kTile < warp_row<Traits>(place_of<Traits>(params)) +
                                                                            Traits::kWarpRows);
}

// All tiles from `from` on. With two stages in shared memory a tile is fetched while the one before is worked on; with
// one, V is fetched while K is multiplied and the next K while V is. Begins with a round without a tile.
template <typename Traits>
__device__ __forceinline__ void attend(const Params& params, Visits<Traits> visits, std::uint32_t from,
                                       Sums<Traits>& sums) {
  Visit current = no_visit_before(from);
  SharedAddress stage = first_stage<Traits>();  // K, then V
  while (true) {
    const Visit next = visits.find(params, place_of<Traits>(params), current);
    const SharedAddress other = params.two_stages ? 2 * first_stage<Traits>() + 2 * Traits::kTileBytes - stage : stage;
    wait_for_copies<0>();
    __syncthreads();  // the tile is there for all, and the one before it is read by none
    const Visit of_v = params.two_stages ? next : current;
    if (of_v.exists()) {
      fetch<Traits>(params, place_of<Traits>(params), params.v, params.v_stride, params.dim_v,
                    of_v.tile(), other + Traits::kTileBytes);
    }
    end_copy_group();
    if (Traits::kFull && next.is_masked()) prefetch_mask<Traits>(params, place_of<Traits>(params), next.tile());
    // A vote, so that the compiler knows that all lanes agree.
    const bool works = __any_sync(kFullMask, sees<Traits>(params, current));
    const bool drops = Traits::kFull && params.dropout.seed != nullptr;
    const std::uint64_t kept =
        works && drops ? kept_scores<Traits>(params, place_of<Traits>(params), current.tile()) : 0;
    Scores<Traits> scores;
    if (works) multiply_keys<Traits>(stage, scores);
    if (!params.two_stages) {
      wait_for_copies<0>();
      __syncthreads();
    }
    if (next.exists()) {
      fetch<Traits>(params, place_of<Traits>(params), params.k, params.k_stride, params.dim, next.tile(), other);
    }
    end_copy_group();
    if (works) {
      finish_scores<Traits>(params, place_of<Traits>(params), current.tile(), current.is_masked(), scores);
      const float scale = scale_of_scores<Traits>(params);
      raise_bases<Traits>(scale, scores, sums);
      if (drops) {
        multiply_values<Traits, true>(stage + Traits::kTileBytes, params.dim_v, scale, kept, scores, sums);
      } else {
        multiply_values<Traits, false>(stage + Traits::kTileBytes, params.dim_v, scale, kept, scores, sums);
      }
    }
    if (!next.exists()) break;
    current = next;
    stage = other;
  }
}

// A row's part of the sums for the second kernel. Lanes that share the row have neighbouring columns.
template <typename Traits>
__device__ __forceinline__ void keep_part(const Params& params, const Place& place, const Sums<Traits>& sums) {
  const std::uint32_t lane = read_lane();
#pragma unroll
  for (int row_of_lane = 0; row_of_lane < 2 * Traits::kBlocks; ++row_of_lane) {
    const int b = row_of_lane / 2, half = row_of_lane % 2;
    const std::uint32_t query = warp_row<Traits>(place) + lane / 4 + 8 * row_of_lane;
    const float denominator = attention::sum_of_row(sums.denominator[b][half]);
    if (query >= params.queries) continue;
    const std::uint64_t row = std::uint64_t{blockIdx.x} * params.queries + query;
    const std::uint64_t part = row * params.splits + blockIdx.z;
    if (lane % 4 == 0) {
      reinterpret_cast<float2*>(params.part_sums)[part] = make_float2(sums.base[b][half], denominator);
    }
    float* out = params.part_out + part * params.dim_v + 2 * (lane % 4);
#pragma unroll
    for (std::uint32_t n = 0; n < Traits::kDim / 8; ++n) {
      if (n * 8 >= params.dim_v) continue;
      *reinterpret_cast<float2*>(out + n * 8) = make_float2(sums.out[b][n][2 * half], sums.out[b][n][2 * half + 1]);
    }
  }
}

// Results go through the warp's rows of shared memory, where its queries were, so that they leave 16 bytes at a time.
template <typename Traits>
__device__ __forceinline__ void write_result(const Params& params, const Place& place, const Sums<Traits>& sums) {
  const std::uint32_t lane = read_lane();
  using T = typename Traits::T;
  const SharedAddress queries = queries_of_warp<Traits>();
  __syncwarp();  // no lane reads queries any more
#pragma unroll
  for (int row_of_lane = 0; row_of_lane < 2 * Traits::kBlocks; ++row_of_lane) {
    const int b = row_of_lane / 2, half = row_of_lane % 2;
    const std::uint32_t row = lane / 4 + 8 * row_of_lane, query = warp_row<Traits>(place) + row;
    const Ending ending = end_row<T>(params, place.head, sums.base[b][half],
                                     attention::sum_of_row(sums.denominator[b][half]));
    if (params.lse != nullptr && lane % 4 == 0 && query < params.queries) {
      params.lse[std::uint64_t{blockIdx.x} * params.queries + query] = ending.lse;
    }
    // Zeros or NaN of a row that sees nothing, whatever was summed up.
    const bool nothing = ending.lse == attention::kMinusInfinity;
    const SharedAddress own = queries + row * Traits::kRowBytes + 4 * (lane % 4);
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n) {
      const float first = nothing ? ending.factor : sums.out[b][n][2 * half] * ending.factor;
      const float second = nothing ? ending.factor : sums.out[b][n][2 * half + 1] * ending.factor;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(own + n * 16), "r"(Cast<T>::pack(first, second)) : "memory");
    }
  }
  __syncwarp();
  constexpr std::uint32_t kPieces = Traits::kDim / 8;
  T* head = static_cast<T*>(params.out) + place.batch * params.out_stride.batch + place.head * params.out_stride.head;
#pragma unroll 4
  for (std::uint32_t i = lane; i < Traits::kWarpRows * kPieces; i += kWarpSize) {
    const std::uint32_t row = i / kPieces, piece = i % kPieces, query = warp_row<Traits>(place) + row;
    if (query >= params.queries || piece * 8 >= params.dim_v) continue;
    const Vec<T, 8> vec = load_shared<T, 8>(queries + row * Traits::kRowBytes + piece * 16);
    *reinterpret_cast<uint4*>(head + query * params.out_stride.row + piece * 8) =
        make_uint4(vec.words[0], vec.words[1], vec.words[2], vec.words[3]);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxWarps* kWarpSize, Traits::kMinCtas)
    mma_kernel(const __grid_constant__ Params params) {
  const Place place = place_of<Traits>(params);
  wait_for_previous_kernel();
  load_queries<Traits>(params, place, dynamic_shared_memory(), blockDim.x / kWarpSize * Traits::kWarpRows);
  end_copy_group();
  Visits<Traits> visits = visits_of<Traits>(params, place);
  const std::uint32_t from = params.splits > 1 ? visits.take_share(params, place, blockIdx.z) : 0;
  Sums<Traits> sums;
#pragma unroll
  for (int b = 0; b < Traits::kBlocks; ++b) {
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.out[b][n][e] = 0.0f;
    }
    sums.base[b][0] = sums.base[b][1] = attention::kMinusInfinity;
    sums.denominator[b][0] = sums.denominator[b][1] = 0.0f;
  }
  attend<Traits>(params, visits, from, sums);
  let_next_kernel_start();
  if (params.splits > 1) {
    keep_part<Traits>(params, place, sums);
  } else {
    write_result<Traits>(params, place, sums);
  }
}

}  // namespace infuse::attention_forward
