// The warp that loads: stage after stage of A and B, by the copy engine. In a cluster each CTA loads half of what both
// need and writes it into the shared memory of both.
#pragma once

#include <cstdint>

#include "gemm/traits.cuh"
#include "infuse/tma.cuh"

namespace infuse::gemm {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Traits>
struct Loader {
  const GemmParams& params;
  GemmShared<Traits> shared;
  std::uint32_t rank;
  bool is_leader;  // one lane talks to the barriers and the copy engine
  RingPlace<Traits::kStages> ring{};

  static constexpr std::uint16_t kBoth = 3;  // CTAs of a cluster, a bit each

  __device__ __forceinline__ void load(bool for_both, SharedAddress place, const CUtensorMap& map, L2 keep,
                                       std::uint32_t column, std::uint32_t row, std::uint32_t group) const {
    const SharedAddress barrier = shared.full(ring.stage);
    const auto x = static_cast<std::int32_t>(column), y = static_cast<std::int32_t>(row);
    if (for_both) {
      load_box_for_cluster(place, map, barrier, keep, x, y, static_cast<std::int32_t>(group), 0, kBoth);
    } else {
      load_box(place, map, barrier, keep, x, y, static_cast<std::int32_t>(group), 0);
    }
  }

  __device__ __forceinline__ void load_a(const Tile& tile, std::uint32_t part, std::uint32_t k) const {
    const bool for_both = params.order.cluster_columns > 1;
#pragma unroll
    for (std::uint32_t half = 0; half < kGroups; ++half) {
      if (for_both && half != rank) continue;
      load(for_both, shared.a(ring.stage) + half * (Traits::kABytes / 2), params.a[part], params.keep_a, k,
           tile.row + half * kGroupRows, 0);
    }
  }

  __device__ __forceinline__ void load_b(const Tile& tile, std::uint32_t part, std::uint32_t k) const {
    const bool for_both = params.order.cluster_rows > 1;
#pragma unroll
    for (std::uint32_t half = 0; half < 2; ++half) {
      if (for_both && half != rank) continue;
      constexpr bool kBeside = Traits::kOperands == Operands::kSideBySide;
      const CUtensorMap& map = params.b[kBeside ? half : part];
      const std::uint32_t column = tile.column + (kBeside ? 0 : half * (Traits::kN / 2));
      const SharedAddress place = shared.b(ring.stage) + half * (Traits::kBBytes / 2);
      if constexpr (Traits::kByColumns) {
#pragma unroll
        for (std::uint32_t block = 0; block < Traits::kN / 128; ++block) {
          load(for_both, place + block * (kChunk * kSwizzledRowBytes), map, params.keep_b,
               column + block * kSwizzledColumns, k, tile.group);
        }
      } else {
        load(for_both, place, map, params.keep_b, k, column, tile.group);
      }
    }
  }

  __device__ __forceinline__ void load_stage(const Tile& tile, std::uint32_t part, std::uint32_t k) const {
    wait(shared.empty(ring.stage), ring.parity ^ 1);
    arrive_expecting(shared.full(ring.stage), Traits::kStageBytes);
    load_a(tile, part, k);
    load_b(tile, part, k);
  }

  __device__ __forceinline__ void prefetch_maps() const {
    if (!is_leader) return;
    constexpr int kMatrices = Traits::kOperands == Operands::kOne ? 1 : 2;
    prefetch_map(params.a[0]);
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) prefetch_map(params.b[i]);
  }

  __device__ __forceinline__ void run(TileWalk walk) {
    constexpr std::uint32_t kParts = Traits::kOperands == Operands::kInSequence ? 2 : 1;
    for (Tile tile; walk.next(tile);) {
      for (std::uint32_t part = 0; part < kParts; ++part) {
        for (std::uint32_t chunk = 0; chunk < params.chunks; ++chunk) {
          if (is_leader) load_stage(tile, part, chunk * kChunk);
          __syncwarp();  // or the other lanes run ahead to the last tile, for which the leader has to wait
          ring.advance();
        }
      }
    }
  }
};

#endif

}  // namespace infuse::gemm
