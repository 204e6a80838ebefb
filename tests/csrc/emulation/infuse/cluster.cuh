// Stands in for csrc/include/infuse/cluster.cuh on the CPU, where CTAs run one after the other: there are no clusters.
#pragma once

#include "cuda_on_cpu.h"
#include "infuse/async_copy.cuh"

namespace infuse {

inline void sync_cluster() { emulation::die("a cluster of CTAs"); }
inline SharedAddress shared_of_cta(SharedAddress own, std::uint32_t) { return own; }
inline float4 load_from_cluster(SharedAddress) { emulation::die("a cluster of CTAs"); }
template <typename Values>
void store_to_cluster(SharedAddress, SharedAddress, const Values&) {
  emulation::die("a cluster of CTAs");
}

}  // namespace infuse
