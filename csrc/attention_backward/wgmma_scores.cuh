// What a warpgroup of the sm_90a kernel does with scores between their products. They are transposed: rows are keys,
// columns are queries, and a thread holds them as wgmma.cuh says.
#pragma once

#include "attention_backward/wgmma_producer.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_backward {

__device__ __forceinline__ float2 load_pair(SharedAddress address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

__device__ __forceinline__ float power_of_2(float x) {
  float result;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <typename T, typename Sizes>
struct Scores {
  static constexpr int kColumns = Sizes::kQueries / 8;  // of eight queries

  const Params& params;
  const int group, warp, lane;  // warp: of the warpgroup
  const Place place;

  __device__ __forceinline__ explicit Scores(const Params& params)
      : params(params),
        group(__shfl_sync(0xffffffffu, threadIdx.x / 128 - 1, 0)),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        place(params, Sizes::kKeys) {}

  __device__ __forceinline__ std::uint32_t key_row() const { return group * 64 + warp * 16 + lane / 4; }

  __device__ __forceinline__ void hide_out_of_bounds(float (&scores)[Sizes::kQueries / 2], const Step& step) const {
#pragma unroll
    for (int i = 0; i < Sizes::kQueries / 2; ++i) {
      const std::uint32_t key = place.key + key_row() + 8 * (i / 2 % 2);
      const std::uint32_t query = step.query + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const bool visible = !(step.flags & kEnd) && key < params.keys && !(params.is_causal && key > query);
      if (!visible) scores[i] = 0.0f;
    }
  }

  // Scores of hidden keys become -inf, an additive mask is added in units of the products.
  __device__ __forceinline__ void apply_mask(float (&scores)[Sizes::kQueries / 2], const Step& step) const {
    const std::int64_t start = place.batch * params.mask_stride.batch + step.head * params.mask_stride.head;
    const std::uint32_t key = place.key + key_row();
    const float inverse_scale = 1.0f / params.scale;
#pragma unroll
    for (int i = 0; i < Sizes::kQueries / 2; i += 2) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::uint32_t own = key + 8 * (i / 2 % 2), query = step.query + i / 4 * 8 + lane % 4 * 2 + j;
        if (own >= params.keys || query >= params.queries) continue;
        const std::int64_t offset = start + query * params.mask_stride.row + own;
        if (params.mask_kind == Mask::kBool) {
          if (!static_cast<const std::uint8_t*>(params.mask)[offset]) scores[i + j] = -INFINITY;
        } else if (params.mask_kind == Mask::kFloat32) {
          scores[i + j] += static_cast<const float*>(params.mask)[offset] * inverse_scale;
        } else {
          const std::uint32_t word = static_cast<const std::uint16_t*>(params.mask)[offset];
          scores[i + j] += Cast<T>::low(word) * inverse_scale;
        }
      }
    }
  }

  // Probabilities in place of scores.
  __device__ __forceinline__ void exponentiate(float (&scores)[Sizes::kQueries / 2], SharedAddress lse) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float2 row = load_pair(lse + (8 * j + lane % 4 * 2) * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scores[4 * j + 2 * i] = power_of_2(scores[4 * j + 2 * i] * params.scale_log2 - row.x);
        scores[4 * j + 2 * i + 1] = power_of_2(scores[4 * j + 2 * i + 1] * params.scale_log2 - row.y);
      }
    }
  }

  __device__ __forceinline__ static void pack_scores(std::uint32_t (&packed)[Sizes::kQueries / 16][4],
                                                     const float (&scores)[Sizes::kQueries / 2]) {
#pragma unroll
    for (int i = 0; i < Sizes::kQueries / 4; ++i) {
      packed[i / 4][i % 4] = Cast<T>::pack(scores[2 * i], scores[2 * i + 1]);
    }
  }

  // dp = probabilities * (dp - delta)
  __device__ __forceinline__ void differentiate(float (&dp)[Sizes::kQueries / 2],
                                                const float (&probabilities)[Sizes::kQueries / 2],
                                                SharedAddress delta) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float2 row = load_pair(delta + (8 * j + lane % 4 * 2) * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        dp[4 * j + 2 * i] = probabilities[4 * j + 2 * i] * (dp[4 * j + 2 * i] - row.x);
        dp[4 * j + 2 * i + 1] = probabilities[4 * j + 2 * i + 1] * (dp[4 * j + 2 * i + 1] - row.y);
      }
    }
  }
};

}  // namespace infuse::attention_backward
