// Clusters: CTAs that run at the same time and write into each other's shared memory. From compute capability 9.0 on;
// before it a cluster is one CTA, and nothing here may be called with more.
#pragma once

#include <cstdint>

namespace infuse {

constexpr int kMaxClusterCtas = 8;  // what every device with clusters can run

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// A barrier in two halves, to be called by all threads of all CTAs. What was written before one's arrival, the others'
// shared memory included, can be read after the wait; the first one also says that all CTAs have started.
__device__ __forceinline__ void arrive_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes to the place in the CTA of rank `rank` that `place` is in this one.
__device__ __forceinline__ void store_in_cluster(float* place, std::uint32_t rank, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  std::uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(place))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
  (void)rank;
  *place = value;
#endif
}

// Where the CTAs of a cluster exchange their sums; two buffers taken in turns, as in RowSumsStorage.
template <int kValues>
struct ClusterSumsStorage {
  float cta_sums[2][kValues][kMaxClusterCtas];
};

// Adds the sums of the cluster's CTAs, always in the order of their ranks. All threads of all CTAs must call this, each
// with the sums of its CTA, after they have waited for the cluster once.
template <int kCount, int kValues>
__device__ __forceinline__ void cluster_sums(float (&values)[kCount], ClusterSumsStorage<kValues>& storage, int turn,
                                             std::uint32_t num_ctas) {
  auto& cta_sums = storage.cta_sums[turn & 1];
  if (threadIdx.x < num_ctas) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) store_in_cluster(&cta_sums[i][cluster_rank()], threadIdx.x, values[i]);
  }
  arrive_at_cluster();
  wait_for_cluster();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0.0f;
    for (std::uint32_t cta = 0; cta < num_ctas; ++cta) values[i] += cta_sums[i][cta];
  }
}

}  // namespace infuse
