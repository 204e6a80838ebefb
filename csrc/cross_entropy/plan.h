// How rows are dealt to CTAs and what of them is kept: plain C++ without CUDA, so that it is tested where there is no
// GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::cross_entropy {

// One CTA takes one row. What of the row fits in its share of the shared memory is read once, the rest comes again from
// L2 for the second pass.
struct Config {
  const char* name;
  int threads;
  int ctas_per_sm;
};

constexpr Config kConfigs[] = {
    {"threads1024x1", 1024, 1},  // 0
    {"threads512x2", 512, 2},    // 1
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;
constexpr int kMaxThreads = 1024;

struct Problem {
  std::int64_t vocab;
  int size_bytes;  // of an element
  bool gradient;   // the second pass is made
};

struct Device {
  int shared_bytes_per_sm;
  int shared_bytes_per_cta;  // most that a CTA can have
};

struct Plan {
  int config;  // index into kConfigs
  int threads;
  int cached_vecs;
  int shared_bytes;
};

// Shared memory of a CTA that is not the cache: 1 KiB of the system, the reductions' arrays and some room.
constexpr int kReservedBytes = 2048;

// `config` is kHeuristic or an index into kConfigs.
constexpr Plan make_plan(const Problem& problem, int config, const Device& device) {
  Plan plan{};
  plan.config = config != kHeuristic ? config : problem.gradient ? 0 : 1;
  const Config& chosen = kConfigs[plan.config];
  plan.threads = chosen.threads;
  if (!problem.gradient) return plan;
  const std::int64_t row_vecs = problem.vocab * problem.size_bytes / kVectorBytes;
  const int share = smaller(device.shared_bytes_per_sm / chosen.ctas_per_sm, device.shared_bytes_per_cta);
  const int room = (share - kReservedBytes) / kVectorBytes;
  plan.cached_vecs = room < row_vecs ? room : static_cast<int>(row_vecs);
  plan.shared_bytes = plan.cached_vecs * kVectorBytes;
  return plan;
}

}  // namespace infuse::cross_entropy
