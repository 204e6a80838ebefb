// From products to probabilities and to the gradient of the scores, for the part of a block that a warp has.
//
//   S = cap(scale * q k^T) + mask        P = exp(S - lse)        dS = P * (dout v^T - delta) * dcap
//
// Transposed: rows are keys, columns queries. A lane's number c of tile (m, n) is of key 16 m + lane / 4 + 8 (c / 2)
// and of query 8 n + 2 (lane % 4) + c % 2 of the warp's.
#pragma once

#include <cstdint>

#include "attention/dropout.cuh"
#include "attention_backward/products.cuh"
#include "attention_backward/visits.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_backward {

template <typename Traits>
using Scores = Sums<Traits::kKeyTiles, Traits::kQueryTiles>;


// 2^x to within two units in the last place; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Calls function(m, n, c) for every number of a lane.
template <typename Traits, typename Function>
__device__ __forceinline__ void for_each_score(Function&& function) {
#pragma unroll
  for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kQueryTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) function(m, n, c);
    }
  }
}

// Where the warp's part of a visit's scores lies: its lane's first key and query.
struct Corner {
  std::uint32_t key, query;
  SharedAddress lse, delta;  // of that query
};

template <typename Traits>
__device__ __forceinline__ Corner corner_of(const Place& place, const Visit& visit) {
  const std::uint32_t of_block = place.query_warp * Traits::kWarpQueries + place.lane % 4 * 2;
  const SharedAddress sums = place.row_sums + visit.stage() * Traits::kRowSumBytes + of_block * 4;
  return {place.work.key_block * Traits::kKeys + place.key_warp * Traits::kWarpKeys + place.lane / 4,
          visit.block() * kQueryBlock + of_block, sums, sums + kQueryBlock * 4};
}

// Of the queries 8 n and 8 n + 1 from a corner on.
__device__ __forceinline__ float2 load_row_sums(SharedAddress first, int n) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(first + n * 32) : "memory");
  return pair;
}

// ---- dropout ----

// Random words come for four neighbouring keys of a query, which four lanes hold. Each of these draws those of one
// number of every tile: bit 4 (the tile's number) + i of what it finds says whether lane i of the four keeps its own.
template <typename Traits>
__device__ __forceinline__ std::uint32_t draw(const Params& params, const Place& place, const Visit& visit,
                                              const Corner& corner) {
  static_assert(Traits::kKeyTiles * Traits::kQueryTiles <= 8);
  const attention::RandomSource source = attention::random_source(params.dropout);
  const std::uint32_t c = place.lane / 4 % 4;
  const std::uint64_t row =
      static_cast<std::uint64_t>(place.work.batch * params.heads + visit.head) * params.queries + corner.query + c % 2;
  std::uint32_t drawn = 0;
#pragma unroll 1
  for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll 1
    for (int n = 0; n < Traits::kQueryTiles; ++n) {
      const std::uint64_t quad = attention::first_quad_of_row(row + n * 8, params.keys) +
                                 (corner.key + m * 16 + c / 2 * 8) / 4;
      const uint4 words = attention::random_words(source, quad);
      const std::uint32_t least = params.dropout.threshold;
      const std::uint32_t bits = (words.x >= least ? 1 : 0) | (words.y >= least ? 2 : 0) | (words.z >= least ? 4 : 0) |
                                 (words.w >= least ? 8 : 0);
      drawn |= bits << (4 * (m * Traits::kQueryTiles + n));
    }
  }
  return drawn;
}

// What the four lanes have drawn, exchanged.
struct Kept {
  std::uint32_t words[4];

  __device__ __forceinline__ Kept(std::uint32_t lane, std::uint32_t drawn) {
#pragma unroll
    for (std::uint32_t c = 0; c < 4; ++c) {
      words[c] = __shfl_sync(kFullMask, drawn, static_cast<int>(lane / 16 * 16 + c * 4 + lane % 4)) >> (lane / 4 % 4);
    }
  }

  // Number c of tile `tile`.
  __device__ __forceinline__ bool is_kept(int tile, int c) const { return (words[c] >> (4 * tile) & 1) != 0; }
};

// From the gradient of what was kept to that of all probabilities, less delta.
template <typename Traits>
__device__ __forceinline__ void undrop(const Params& params, const Place& place, const Corner& corner,
                                       std::uint32_t drawn, Scores<Traits>& dscores) {
  const Kept kept(place.lane, drawn);
  for_each_score<Traits>([&](int m, int n, int c) {
    const float2 delta = load_row_sums(corner.delta, n);
    const float scaled = dscores[m][n][c] * params.dropout.scale;
    const float gradient = kept.is_kept(m * Traits::kQueryTiles + n, c) ? scaled : 0.0f;
    dscores[m][n][c] = gradient - (c % 2 == 0 ? delta.x : delta.y);
  });
}

template <typename Traits>
__device__ __forceinline__ void drop(const Params& params, const Place& place, std::uint32_t drawn,
                                     Scores<Traits>& probabilities) {
  const Kept kept(place.lane, drawn);
  for_each_score<Traits>([&](int m, int n, int c) {
    const float scaled = probabilities[m][n][c] * params.dropout.scale;
    probabilities[m][n][c] = kept.is_kept(m * Traits::kQueryTiles + n, c) ? scaled : 0.0f;
  });
}

// ---- softcap, masks, edges; all in powers of two ----

// tanh within 2e-7.
__device__ __forceinline__ float fast_tanh(float x) {
  constexpr float kTwiceLog2e = 2.8853900817779268f;
  return 1.0f - __fdividef(2.0f, 1.0f + power_of_two(x * kTwiceLog2e));
}

template <typename Traits>
__device__ __forceinline__ void cap(const Params& params, Scores<Traits>& scores, Scores<Traits>& dscores) {
  for_each_score<Traits>([&](int m, int n, int c) {
    const float capped = fast_tanh(scores[m][n][c] * params.scale_log2);
    scores[m][n][c] = capped * params.softcap_log2;
    dscores[m][n][c] *= 1.0f - capped * capped;
  });
}

__device__ __forceinline__ float mask_value(std::uint8_t element) { return element != 0 ? 0.0f : kMinusInfinity; }

// Minus infinity stays; other numbers stay finite, the lowest of all too, which masks are filled with.
template <typename Float>
__device__ __forceinline__ float mask_value(Float element) {
  constexpr float kLowest = -3e38f, kLog2e = 1.4426950408889634f;
  const float value = static_cast<float>(element);
  return value == kMinusInfinity ? value : fmaxf(value * kLog2e, kLowest);
}

template <typename Traits, typename Element>
__device__ __forceinline__ void add_mask(const Params& params, const Place& place, const Visit& visit,
                                         const Corner& corner, Scores<Traits>& scores) {
  const auto* head = head_of<Element>(params.mask, params.mask_stride, place.work.batch, visit.head);
#pragma unroll
  for (int n = 0; n < Traits::kQueryTiles; ++n) {
#pragma unroll
    for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const std::uint32_t query = corner.query + n * 8 + c % 2, key = corner.key + m * 16 + c / 2 * 8;
        const Element* row = head + (query < params.queries ? query * params.mask_stride.row : 0);
        scores[m][n][c] += mask_value(__ldg(row + (key < params.keys ? key : 0)));
      }
    }
    // So that there are not more loads under way than there are registers.
    if ((n + 1) * Traits::kKeyTiles % 2 == 0) __syncwarp();
  }
}

template <typename Traits>
__device__ __forceinline__ void add_mask(const Params& params, const Place& place, const Visit& visit,
                                         const Corner& corner, Scores<Traits>& scores) {
  if (params.mask_kind == Mask::kBool) {
    add_mask<Traits, std::uint8_t>(params, place, visit, corner, scores);
  } else if (params.mask_kind == Mask::kTwoBytes) {
    add_mask<Traits, typename Traits::T>(params, place, visit, corner, scores);
  } else {
    add_mask<Traits, float>(params, place, visit, corner, scores);
  }
}

// Keys beyond the last, or beyond the query where attention is causal.
template <typename Traits>
__device__ __forceinline__ void hide(const Params& params, const Corner& corner, bool all, Scores<Traits>& scores) {
  for_each_score<Traits>([&](int m, int n, int c) {
    const std::uint32_t query = corner.query + n * 8 + c % 2, key = corner.key + m * 16 + c / 2 * 8;
    if (all || key >= params.keys || (params.is_causal && key > query)) scores[m][n][c] = kMinusInfinity;
  });
}

// Brings the products of q and k to what lse is subtracted from, and multiplies those of dout and v by the softcap's
// derivative. Returns what the scores must still be multiplied by.
template <typename Traits>
__device__ __forceinline__ float finish_scores(const Params& params, const Place& place, const Visit& visit,
                                               const Corner& corner, Scores<Traits>& scores, Scores<Traits>& dscores) {
  const std::uint32_t first_of_block = place.key_warp * Traits::kWarpKeys;
  const std::uint32_t end = place.work.key_block * Traits::kKeys + first_of_block + Traits::kWarpKeys;
  const std::uint32_t state = visit.states() >> (first_of_block / attention::kMapTile * 2) & 3;
  const std::uint32_t first_query = visit.block() * kQueryBlock + place.query_warp * Traits::kWarpQueries;
  const bool is_edge = end > params.keys || (params.is_causal && end > first_query);
  if (state == attention::kOpen && !is_edge && params.softcap_log2 == 0.0f) return params.scale_log2;
  if (params.softcap_log2 != 0.0f) {
    cap<Traits>(params, scores, dscores);
  } else {
    for_each_score<Traits>([&](int m, int n, int c) { scores[m][n][c] *= params.scale_log2; });
  }
  if (state == attention::kMasked) add_mask<Traits>(params, place, visit, corner, scores);
  if (is_edge || state == attention::kHidden) {
    hide<Traits>(params, corner, state == attention::kHidden, scores);
  }
  return 1.0f;
}

// ---- the block ----

// A block of scores, rounded, for the other warps.
template <typename Traits>
__device__ __forceinline__ void share_scores(const Place& place, SharedAddress to, const Scores<Traits>& scores) {
  using T = typename Traits::T;
  const SharedAddress own = to + (place.key_warp * Traits::kWarpKeys + place.lane / 4) * Traits::kScoreRowBytes +
                            (place.query_warp * Traits::kWarpQueries + place.lane % 4 * 2) * 2;
#pragma unroll
  for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kQueryTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t word = Cast<T>::pack(scores[m][n][2 * half], scores[m][n][2 * half + 1]);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(own + (m * 16 + half * 8) * Traits::kScoreRowBytes + n * 16),
                     "r"(word)
                     : "memory");
      }
    }
  }
}

// scores: in products of q and k, out probabilities as dv needs them. dscores: in products of dout and v, less delta,
// out the gradient of the scaled scores. drawn: see draw.
template <typename Traits>
__device__ __forceinline__ void differentiate(const Params& params, const Place& place, const Visit& visit,
                                              const Corner& corner, std::uint32_t drawn, Scores<Traits>& scores,
                                              Scores<Traits>& dscores) {
  const bool has_dropout = params.dropout.seed != nullptr;
  if (has_dropout) undrop<Traits>(params, place, corner, drawn, dscores);
  const float factor = finish_scores<Traits>(params, place, visit, corner, scores, dscores);
#pragma unroll
  for (int n = 0; n < Traits::kQueryTiles; ++n) {
    const float2 lse = load_row_sums(corner.lse, n);
#pragma unroll
    for (int m = 0; m < Traits::kKeyTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        scores[m][n][c] = power_of_two(scores[m][n][c] * factor - (c % 2 == 0 ? lse.x : lse.y));
        dscores[m][n][c] *= scores[m][n][c];
      }
    }
  }
  if (has_dropout) drop<Traits>(params, place, drawn, scores);
}

// What the products of dout and v start from: minus delta, unless dropout comes between.
template <typename Traits>
__device__ __forceinline__ void start_dscores(const Params& params, const Corner& corner, Scores<Traits>& dscores) {
  const bool has_dropout = params.dropout.seed != nullptr;
#pragma unroll
  for (int n = 0; n < Traits::kQueryTiles; ++n) {
    const float2 delta = load_row_sums(corner.delta, n);
#pragma unroll
    for (int m = 0; m < Traits::kKeyTiles; ++m) {
      dscores[m][n][0] = dscores[m][n][2] = has_dropout ? 0.0f : -delta.x;
      dscores[m][n][1] = dscores[m][n][3] = has_dropout ? 0.0f : -delta.y;
    }
  }
}

}  // namespace infuse::attention_backward
