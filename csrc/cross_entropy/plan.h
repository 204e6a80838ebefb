// How rows are dealt to CTAs and what of them is kept: plain C++ without CUDA, so that it is tested where there is no
// GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::cross_entropy {

// A cluster of CTAs takes one row. What of its part fits in a CTA's share of the shared memory is read once, the rest
// comes again from L2 for the second pass.
struct Config {
  const char* name;
  int threads;
  int ctas_per_sm;
  int cluster;
};

constexpr Config kConfigs[] = {
    {"threads1024x1", 1024, 1, 1},           // 0
    {"threads512x2", 512, 2, 1},             // 1
    {"threads512x2_clusters2", 512, 2, 2},   // 2
    {"threads512x2_clusters4", 512, 2, 4},   // 3
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;
constexpr int kMaxThreads = 1024;
constexpr int kMaxCachedVecs = 16;  // that a thread keeps in shared memory

struct Problem {
  std::int64_t vocab;
  int size_bytes;  // of an element
  bool gradient;   // the second pass is made
};

struct Device {
  int shared_bytes_per_sm;
  int shared_bytes_per_cta;  // most that a CTA can have
  bool has_clusters;
};

struct Plan {
  int config;  // index into kConfigs
  int threads;
  int parts;  // of a row
  int cached_vecs;
  int shared_bytes;
};

// Shared memory of a CTA that is not the cache: 1 KiB of the system, the reductions' arrays and some room.
constexpr int kReservedBytes = 2048;

// On an H200 with 2048 rows of 128256 bfloat16, gradient included: 3.3 TB/s by clusters of two, 3.2 by one large CTA,
// 2.8 by one of two small ones; with 4096 rows of 50257, which fit in a small CTA's share: 2.5, 2.1 and 3.2; with
// 1024 rows of 262144: 2.8, 2.6, 2.6, and 3.1 by clusters of four. Without the gradient nothing is kept, and the small
// CTAs are the fastest throughout.
constexpr std::int64_t kSmallCtaBytes = 112 * 1024;
constexpr int choose_config(const Problem& problem, const Device& device) {
  const std::int64_t bytes = problem.vocab * problem.size_bytes;
  if (!problem.gradient || bytes <= kSmallCtaBytes) return 1;
  if (!device.has_clusters) return 0;
  return bytes <= 3 * kSmallCtaBytes ? 2 : 3;
}

// `config` is kHeuristic or an index into kConfigs; without clusters those that need them stand for the first.
constexpr Plan make_plan(const Problem& problem, int config, const Device& device) {
  Plan plan{};
  plan.config = config != kHeuristic ? config : choose_config(problem, device);
  if (!device.has_clusters && kConfigs[plan.config].cluster > 1) plan.config = 0;
  const Config& chosen = kConfigs[plan.config];
  plan.threads = chosen.threads;
  plan.parts = chosen.cluster;
  if (!problem.gradient) return plan;
  const std::int64_t part_vecs = ceil_div(problem.vocab * problem.size_bytes / kVectorBytes, plan.parts);
  const int share = smaller(device.shared_bytes_per_sm / chosen.ctas_per_sm, device.shared_bytes_per_cta);
  const int room = smaller((share - kReservedBytes) / kVectorBytes, kMaxCachedVecs * plan.threads);
  plan.cached_vecs = room < part_vecs ? room : static_cast<int>(part_vecs);
  plan.shared_bytes = plan.cached_vecs * kVectorBytes;
  return plan;
}

}  // namespace infuse::cross_entropy
