// Tiles, shared memory and barriers of GEMMs that hand their results over.
#pragma once

#include "handed_gemm/order.h"
#include "infuse/mbarrier.cuh"
#include "infuse/wgmma.cuh"

namespace infuse::handed_gemm {

constexpr int kDepth = 64;  // of a stage
constexpr int kColumnBlocks = kTileColumns / kSwizzledColumns;
constexpr int kWarpgroup = 128;
constexpr int kMultipliers = 2;  // warpgroups, 64 rows each
constexpr int kFinishers = 3;    // warps, beside one that loads
constexpr int kThreads = (kMultipliers + 1) * kWarpgroup;
constexpr int kMultiplierRegisters = 184, kOtherRegisters = 136;
static_assert(kMultipliers * kMultiplierRegisters + kOtherRegisters <= 3 * 168, "what a thread has on average");

constexpr std::uint32_t kABytes = kTileRows * kDepth * 2;
constexpr std::uint32_t kBBlockBytes = kDepth * kSwizzledRowBytes;
constexpr std::uint32_t kBBytes = kColumnBlocks * kBBlockBytes;
constexpr std::uint32_t kStageBytes = kABytes + kBBytes;
constexpr std::uint32_t kResultBlockBytes = kTileRows * kSwizzledRowBytes;
constexpr std::uint32_t kResultBytes = kColumnBlocks * kResultBlockBytes;
constexpr int kStages = 3;
constexpr int kSharedBytes = kStages * kStageBytes + kResultBytes + 1024 /* alignment */ + 128 /* barriers */;

// Code for something else than 9.0a is empty, and cannot be launched: is_compiled asks how many threads it takes.
constexpr int threads_of_kernel() {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return 32;
#else
  return kThreads;
#endif
}

// The shared memory of a CTA: stages of a and b, the rounded result, barriers.
struct Shared {
  SharedAddress start;

  __device__ __forceinline__ SharedAddress a(std::uint32_t stage) const { return start + stage * kStageBytes; }
  __device__ __forceinline__ SharedAddress b(std::uint32_t stage) const { return a(stage) + kABytes; }
  __device__ __forceinline__ SharedAddress result() const { return start + kStages * kStageBytes; }
  __device__ __forceinline__ SharedAddress full(std::uint32_t stage) const {
    return barriers() + stage * kBarrierBytes;
  }
  __device__ __forceinline__ SharedAddress empty(std::uint32_t stage) const { return full(kStages + stage); }
  __device__ __forceinline__ SharedAddress result_full() const { return full(2 * kStages); }
  __device__ __forceinline__ SharedAddress result_empty() const { return full(2 * kStages + 1); }

  // 16 bytes of a row of the result, in blocks of 64 columns that are swizzled as TMA wants them.
  __device__ __forceinline__ SharedAddress piece(std::uint32_t row, std::uint32_t number) const {
    return result() + number / 8 * kResultBlockBytes + row * kSwizzledRowBytes + (number ^ row) % 8 * 16;
  }

 private:
  __device__ __forceinline__ SharedAddress barriers() const { return result() + kResultBytes; }
};

}  // namespace infuse::handed_gemm
