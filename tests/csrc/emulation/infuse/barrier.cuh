// Stands in for csrc/include/infuse/barrier.cuh on the CPU: the CTA's threads wait for one another, groups in step.
#pragma once

#include "cuda_on_cpu.h"

namespace infuse {

constexpr int kMaxGroupBarriers = 15;

inline void sync_group(int group, int threads) {
  if (group >= kMaxGroupBarriers || threads % 32 != 0) emulation::die("a group barrier that hardware does not have");
  emulation::wait_for_all();
}

}  // namespace infuse
