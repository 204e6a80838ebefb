// Stands in for csrc/include/infuse/mbarrier.cuh on the CPU. A barrier counts the bytes that were announced and did not
// arrive; copies arrive at once, so whoever waits must find none.
#pragma once

#include "cuda_on_cpu.h"
#include "infuse/async_copy.cuh"

namespace infuse {

constexpr int kBarrierBytes = 8;

struct EmulatedBarrier {
  std::int32_t bytes, phases;
};

inline EmulatedBarrier& barrier_at(SharedAddress address) {
  return *reinterpret_cast<EmulatedBarrier*>(shared_bytes_at(address, kBarrierBytes));
}

inline void init_barrier(SharedAddress barrier, std::uint32_t) { barrier_at(barrier) = {}; }
inline void publish_barriers() {}

inline void arrive_expecting(SharedAddress barrier, std::uint32_t bytes) {
  barrier_at(barrier).bytes += static_cast<std::int32_t>(bytes);
  ++barrier_at(barrier).phases;
}

inline void wait(SharedAddress barrier, std::uint32_t) {
  if (barrier_at(barrier).phases != 1 || barrier_at(barrier).bytes != 0) emulation::die("a wait that never ends");
}

}  // namespace infuse
