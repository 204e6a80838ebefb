// Copies of boxes between tensors in global memory and shared memory by the copy engine (TMA, sm_90). The tensor is
// described by a map that the host makes (infuse/tensor_map.h) and passes as part of a __grid_constant__ parameter.
// What lies outside of the tensor is read as zeros and not written.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "infuse/async_copy.cuh"

namespace infuse {

// How long lines stay in L2; the values are those of createpolicy for all of an access.
enum class L2 : std::uint64_t {
  kNormal = 0x1000000000000000ull,
  kEvictFirst = 0x12F0000000000000ull,
  kEvictLast = 0x14F0000000000000ull,
};

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box [.., rows, columns] whose first element has the coordinates (column, row, head, batch); `barrier` counts its
// bytes. By one thread. Shared memory aligned to 1024 bytes for swizzled maps.
__device__ __forceinline__ void load_box(SharedAddress shared, const CUtensorMap& map, SharedAddress barrier, L2 keep,
                                         std::int32_t column, std::int32_t row, std::int32_t head,
                                         std::int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(static_cast<std::uint64_t>(keep))
      : "memory");
}

// The same, into that place of the shared memory of every CTA of the cluster whose bit is set in `ctas`; in each of them
// the barrier at the place of `barrier` counts the bytes.
__device__ __forceinline__ void load_box_for_cluster(SharedAddress shared, const CUtensorMap& map,
                                                     SharedAddress barrier, L2 keep, std::int32_t column,
                                                     std::int32_t row, std::int32_t head, std::int32_t batch,
                                                     std::uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(ctas),
      "l"(static_cast<std::uint64_t>(keep))
      : "memory");
}

// The other way. The shared memory may be written again after wait_for_box_reads.
__device__ __forceinline__ void store_box(const CUtensorMap& map, SharedAddress shared, std::int32_t column,
                                          std::int32_t row, std::int32_t head, std::int32_t batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap& map, SharedAddress shared, std::int32_t column,
                                          std::int32_t row, std::int32_t head, std::int32_t batch, L2 keep) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(
          &map),
      "r"(shared), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(static_cast<std::uint64_t>(keep))
      : "memory");
}

// Ends a group of this thread's stores.
__device__ __forceinline__ void end_box_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_box_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Between a thread's own accesses to shared memory and those of the copy engine or of wgmma.
__device__ __forceinline__ void fence_shared_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace infuse
