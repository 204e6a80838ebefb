// What a warp does to its scores of a tile before the softmax: scale, cap, mask.
#pragma once

#include <cstdint>
#include <utility>

#include "attention_forward/mma_state.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_forward {

// One element's bits, 0 where it does not exist. The place is in the assembly, so that all elements share an address.
template <typename Element, int kPlace>
__device__ __forceinline__ std::uint32_t load_element(const Element* first, bool exists) {
  std::uint32_t bits;
#define INFUSE_LOAD_ELEMENT(type)                 \
  asm volatile(                                   \
      "{\n"                                       \
      "  .reg .pred exists;\n"                    \
      "  setp.ne.b32 exists, %2, 0;\n"            \
      "  mov.b32 %0, 0;\n"                        \
      "  @exists ld.global.nc." type " %0, [%1 + %3];\n" \
      "}"                                         \
      : "=&r"(bits)                                \
      : "l"(first), "r"(static_cast<int>(exists)), "n"(kPlace * static_cast<int>(sizeof(Element))))
  if constexpr (sizeof(Element) == 1) {
    INFUSE_LOAD_ELEMENT("u8");
  } else if constexpr (sizeof(Element) == 2) {
    INFUSE_LOAD_ELEMENT("u16");
  } else {
    INFUSE_LOAD_ELEMENT("u32");
  }
#undef INFUSE_LOAD_ELEMENT
  return bits;
}

// At most 16 bytes at a time, for want of registers.
template <typename Element>
constexpr int kMaskElems = sizeof(Element) == 4 ? 4 : 8;
template <typename Element>
using MaskVec = Vec<Element, kMaskElems<Element>>;

// The first `count` of them, one by one.
template <typename Element, int... kPlaces>
__device__ __forceinline__ void load_elements(MaskVec<Element>& vec, const Element* first, std::uint32_t count,
                                              std::integer_sequence<int, kPlaces...>) {
  constexpr int kInWord = 4 / static_cast<int>(sizeof(Element));
  ((vec.words[kPlaces / kInWord] |= load_element<Element, kPlaces>(first, kPlaces < count)
                                    << kPlaces % kInWord * 8 * static_cast<int>(sizeof(Element))),
   ...);
}

// Neighbouring elements of a mask's row from `key` on, as numbers to add; what lies beyond the last key is any.
template <typename Element>
__device__ __forceinline__ void load_mask(const Element* row, std::uint32_t key, const Params& params,
                                          float (&values)[kMaskElems<Element>]) {
  constexpr int kElems = kMaskElems<Element>;
  MaskVec<Element> vec = {};
  if (params.mask_is_aligned && key + kElems <= params.keys) {
    if constexpr (sizeof(Element) == 1) {
      const uint2 words = __ldg(reinterpret_cast<const uint2*>(row + key));
      vec.words[0] = words.x;
      vec.words[1] = words.y;
    } else {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(row + key));
      vec.words[0] = words.x;
      vec.words[1] = words.y;
      vec.words[2] = words.z;
      vec.words[3] = words.w;
    }
  } else {
    load_elements<Element>(vec, row + key, key < params.keys ? params.keys - key : 0,
                           std::make_integer_sequence<int, kElems>());
  }
  if constexpr (sizeof(Element) == 1) {
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
      values[e] = (vec.words[e / 4] >> e % 4 * 8 & 255u) != 0 ? 0.0f : attention::kMinusInfinity;
    }
  } else {
    unpack(vec, values);
  }
}

// Brings the mask of the warp's rows and a tile into L2. A lane a row; a row's part is at most two lines of 128 bytes.
template <typename Traits>
__device__ __forceinline__ void prefetch_mask(const Params& params, const Place& place, std::uint32_t tile) {
  const std::uint32_t lane = read_lane(), query = warp_row<Traits>(place) + lane, key = tile * kTile;
  if (lane >= Traits::kWarpRows || query >= params.queries) return;
  const std::int64_t size = attention::mask_size_bytes(params.mask_kind);
  const char* row = static_cast<const char*>(params.mask) +
                    (place.batch * params.mask_stride.batch + place.head * params.mask_stride.head +
                     query * params.mask_stride.row + key) *
                        size;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(row));
  if (size == 4 && key + kTile / 2 < params.keys) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + 128));
}

// Multiplies by `scale` and adds the mask; a bool one hides instead. Rows beyond the last query get that of one before
// them.
template <typename Traits, typename Element>
__device__ __forceinline__ void apply_mask(const Params& params, const Place& place, std::uint32_t tile, float scale,
                                           Scores<Traits>& scores) {
  constexpr int kElems = kMaskElems<Element>;
  const std::uint32_t lane = read_lane(), first = tile * kTile + 8 * (lane % 4);
  std::uint32_t query = warp_row<Traits>(place) + lane / 4;
  const Element* row = static_cast<const Element*>(params.mask) + place.batch * params.mask_stride.batch +
                       place.head * params.mask_stride.head +
                       (query < params.queries ? query : params.queries - 1) * params.mask_stride.row;
#pragma unroll
  for (int row_of_lane = 0; row_of_lane < 2 * Traits::kBlocks; ++row_of_lane) {
    const int b = row_of_lane / 2, half = row_of_lane % 2;
#pragma unroll
    for (int i = 0; i < kTile / 4 / kElems; ++i) {
      const int of_lane = i * kElems, key = of_lane / 8 * 32 + of_lane % 8;  // the lane has eight of every 32
      float values[kElems];
      load_mask(row, first + key, params, values);
#pragma unroll
      for (int e = 0; e < kElems; ++e) {
        float& score = scores[b][(of_lane + e) / 2][2 * half + e % 2];
        if constexpr (sizeof(Element) == 1) {
          score = values[e] == 0.0f ? score : attention::kMinusInfinity;
        } else {
          score = fmaf(score, scale, attention::in_powers_of_two(values[e]));
        }
      }
    }
    // Step by step, as registers do not suffice for an address a row.
    query += 8;
    row += query < params.queries ? 8 * params.mask_stride.row : 0;
    asm volatile("" : "+l"(row));
  }
}

// Keys from `end` on, which may differ from row to row, become minus infinity.
template <typename Traits>
__device__ __forceinline__ void hide_beyond(const Params& params, const Place& place, std::uint32_t tile,
                                            Scores<Traits>& scores) {
  const std::uint32_t lane = read_lane();
  const std::uint32_t first_query = warp_row<Traits>(place) + lane / 4, first = tile * kTile + 8 * (lane % 4);
#pragma unroll
  for (int row_of_lane = 0; row_of_lane < 2 * Traits::kBlocks; ++row_of_lane) {
    const int b = row_of_lane / 2, half = row_of_lane % 2;
    const std::uint32_t query = first_query + 8 * row_of_lane;
    const std::uint32_t end = params.is_causal && query + 1 < params.keys ? query + 1 : params.keys;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first + n / 4 * 32 + n % 4 * 2 + e >= end) scores[b][n][2 * half + e] = attention::kMinusInfinity;
      }
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void scale_and_cap(const Params& params, Scores<Traits>& scores) {
#pragma unroll
  for (auto& block : scores) {
#pragma unroll
    for (auto& quad : block) {
#pragma unroll
      for (float& score : quad) score *= params.scale_log2;
    }
  }
  if (params.softcap_log2 == 0.0f) return;
#pragma unroll
  for (auto& block : scores) {
#pragma unroll
    for (auto& quad : block) {
#pragma unroll
      for (float& score : quad) score = params.softcap_log2 * attention::tanh_of_score(score);
    }
  }
}

// Scale and cap where they come first, and whatever hides keys.
template <typename Traits>
__device__ __forceinline__ void finish_scores(const Params& params, const Place& place, std::uint32_t tile,
                                              bool is_masked, Scores<Traits>& scores) {
  if constexpr (Traits::kFull) {
    // A mask that is added brings the scale along, without a cap between them.
    const bool scales_late = is_masked && params.mask_kind != Mask::kBool && params.softcap_log2 == 0.0f;
    if (params.scales_first && !scales_late) scale_and_cap<Traits>(params, scores);
    if (is_masked) {
      const float scale = scales_late ? params.scale_log2 : 1.0f;
      if (params.mask_kind == Mask::kBool) {
        apply_mask<Traits, std::uint8_t>(params, place, tile, scale, scores);
      } else if (params.mask_kind == Mask::kTwoBytes) {
        apply_mask<Traits, typename Traits::T>(params, place, tile, scale, scores);
      } else {
        apply_mask<Traits, float>(params, place, tile, scale, scores);
      }
    }
  }
  const std::uint32_t past = (tile + 1) * kTile;
  if (past > params.keys || (params.is_causal && past > warp_row<Traits>(place) + 1)) {
    hide_beyond<Traits>(params, place, tile, scores);
  }
}

}  // namespace infuse::attention_forward
