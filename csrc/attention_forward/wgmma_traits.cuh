// Sizes of the wgmma kernel and where things lie in its shared memory.
#pragma once

#include <cstdint>

#include "attention_forward/wgmma_params.h"
#include "attention_forward/wgmma_tiles.h"
#include "infuse/mbarrier.cuh"
#include "infuse/wgmma.cuh"

namespace infuse::attention_forward {

constexpr int kWarpgroup = 128, kGroupRows = 64;
constexpr int kTilesAhead = 2;

// kGroups: warpgroups that multiply; one more loads.
template <typename T_, int kDim_, int kKeys_, int kGroups_>
struct WgmmaTraits {
  using T = T_;
  static constexpr int kDim = kDim_;    // head_dim of q, k and v is at most this
  static constexpr int kKeys = kKeys_;  // of a tile
  static constexpr int kGroups = kGroups_;
  static constexpr int kStages = kWgmmaStages;
  // Steps of 16 keys whose powers are found while the products of the tile before may still run: what fits into the
  // registers beside the powers of that tile.
  static constexpr int kEarly = kGroups < 3 ? kKeys / 32 : kDim > 64 ? kKeys / 64 : 0;
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kLoaderRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kGroupRegisters = kGroups == 3 ? 160 : 232;
  static constexpr int kBlocks = (kDim + kSwizzledColumns - 1) / kSwizzledColumns;  // of 64 columns
  static constexpr int kQueryBlockBytes = kRows * kSwizzledRowBytes;
  static constexpr int kKeyBlockBytes = kKeys * kSwizzledRowBytes;
  static constexpr int kQueryBytes = kBlocks * kQueryBlockBytes;
  static constexpr int kStageBytes = kBlocks * kKeyBlockBytes;
  static constexpr int kQueryStages = wgmma_query_stages(kDim, kRows, kKeys);
  static constexpr int kBarriersOffset = kQueryStages * kQueryBytes + 2 * kStages * kStageBytes;
  static constexpr int kBarriers = 2 * (kQueryStages + kStages + kTilesAhead);
  static constexpr int kInfoOffset = kBarriersOffset + kBarriers * kBarrierBytes;
  static constexpr int kSharedBytes = wgmma_shared_bytes(kDim, kRows, kKeys);
  static_assert(kDim % 16 == 0 && kKeys % 16 == 0 && kInfoOffset + 8 * kTilesAhead + 4 * kStages <= kSharedBytes);
};

// Stages of queries, and of the keys of a visit with the values of the visit before, whose products are issued
// together; for each a barrier that says it is full and one that says it is empty. The same for the next two tiles.
template <typename Traits>
struct WgmmaShared {
  SharedAddress start;

  __device__ __forceinline__ SharedAddress queries(std::uint32_t stage) const {
    return start + stage * Traits::kQueryBytes;
  }
  __device__ __forceinline__ SharedAddress keys(std::uint32_t stage) const {
    return start + Traits::kQueryStages * Traits::kQueryBytes + stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ SharedAddress values(std::uint32_t stage) const { return keys(Traits::kStages + stage); }
  __device__ __forceinline__ SharedAddress full(std::uint32_t stage) const { return barrier(stage); }
  __device__ __forceinline__ SharedAddress empty(std::uint32_t stage) const { return barrier(Traits::kStages + stage); }
  __device__ __forceinline__ SharedAddress tile_full(std::uint32_t slot) const {
    return barrier(2 * Traits::kStages + slot);
  }
  __device__ __forceinline__ SharedAddress tile_empty(std::uint32_t slot) const {
    return barrier(2 * Traits::kStages + kTilesAhead + slot);
  }
  __device__ __forceinline__ SharedAddress queries_full(std::uint32_t stage) const {
    return barrier(2 * (Traits::kStages + kTilesAhead) + stage);
  }
  __device__ __forceinline__ SharedAddress queries_empty(std::uint32_t stage) const {
    return barrier(2 * (Traits::kStages + kTilesAhead) + Traits::kQueryStages + stage);
  }
  // Two words: block of rows, and head of all batches.
  __device__ __forceinline__ SharedAddress tile(std::uint32_t slot) const {
    return start + Traits::kInfoOffset + 8 * slot;
  }
  // A word: which tile of keys a stage holds, and kIsMasked, kIsLast.
  __device__ __forceinline__ SharedAddress visit(std::uint32_t stage) const {
    return start + Traits::kInfoOffset + 8 * kTilesAhead + 4 * stage;
  }

 private:
  __device__ __forceinline__ SharedAddress barrier(std::uint32_t i) const {
    return start + Traits::kBarriersOffset + i * kBarrierBytes;
  }
};

constexpr std::uint32_t kIsMasked = 1u << 30, kIsLast = 1u << 31;  // of a visit
constexpr std::uint32_t kNoTile = ~0u;                             // instead of a block of rows

__device__ __forceinline__ std::uint32_t load_word(SharedAddress address) {
  std::uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// The place in a ring of kStages of the n-th buffer that is filled.
template <int kStages>
__device__ __forceinline__ RingPlace<kStages> place_in_ring(std::uint32_t n) {
  return {n % kStages, n / kStages & 1};
}

// The same in every lane, and known to the compiler to be so: what depends on it stays in uniform registers.
__device__ __forceinline__ std::uint32_t load_uniform(SharedAddress address) {
  return __shfl_sync(0xffffffffu, load_word(address), 0);
}

__device__ __forceinline__ void store_word(SharedAddress address, std::uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

}  // namespace infuse::attention_forward
