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

// The same place of the shared memory of the cluster's CTA `rank`.
__device__ __forceinline__ SharedAddress shared_of_cta(SharedAddress own, std::uint32_t rank) {
  SharedAddress address = own;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
#endif
  return address;
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

}  // namespace infuse
