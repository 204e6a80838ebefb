// Clusters of CTAs that read each other's shared memory (sm_90 and later). Code for older devices never launches one.
#pragma once

#include <cstdint>

#include "infuse/async_copy.cuh"

namespace infuse {

// All threads of all CTAs of the cluster; what they wrote to shared memory before can be read after.
__device__ __forceinline__ void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
#endif
}

// The two halves of sync_cluster, for barriers in shared memory (infuse/mbarrier.cuh): those that were published before
// are ready, once all threads of the cluster have told. Orders no other writes, which would take a fence of the device.
__device__ __forceinline__ void tell_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same place of the shared memory of the cluster's CTA `rank`.
__device__ __forceinline__ SharedAddress shared_of_cta(SharedAddress own, std::uint32_t rank) {
  SharedAddress address = own;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
#endif
  return address;
}

// Number of this CTA in its cluster.
__device__ __forceinline__ std::uint32_t rank_in_cluster() {
  std::uint32_t rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Arrives at a barrier (infuse/mbarrier.cuh) of a CTA of the cluster; the address is one of shared_of_cta.
__device__ __forceinline__ void arrive_in_cluster([[maybe_unused]] SharedAddress barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

__device__ __forceinline__ float4 load_from_cluster(SharedAddress address) {
  float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "r"(address)
               : "memory");
#endif
  return values;
}

// Writes into another CTA's shared memory in the background; its barrier there counts the bytes.
__device__ __forceinline__ void store_to_cluster(SharedAddress address, SharedAddress barrier, const float4& values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
      "r"(barrier), "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w)
      : "memory");
#endif
}

__device__ __forceinline__ void store_to_cluster(SharedAddress address, SharedAddress barrier, const float2& values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(address),
               "r"(barrier), "f"(values.x), "f"(values.y)
               : "memory");
#endif
}

}  // namespace infuse
