// How the backward of a gated activation is cut up. Plain C++ without CUDA.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::gated_backward {

struct Config {
  const char* name;
  int vecs;     // that a thread holds of each tensor, all fetched before the first is used
  int threads;  // of a CTA
};

constexpr Config kConfigs[] = {
    {"vec1x256", 1, 256},  // 0
    {"vec2x128", 2, 128},  // 1
    {"vec1x128", 1, 128},  // 2
    {"vec2x256", 2, 256},  // 3
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

struct Plan {
  int config;  // index into kConfigs
  int elems;   // of a vector: 8, or 1 where rows are odd or not aligned
  std::int64_t vecs, ctas;
};

// alignment_bytes: of all row starts, also those of up and dup in the middle of a row; of two-byte elements.
constexpr Plan make_plan(std::int64_t rows, std::int64_t dim, int alignment_bytes, int config) {
  Plan plan{};
  plan.config = config == kHeuristic ? 0 : config;
  plan.elems = dim % 8 == 0 && is_aligned(8, 2, alignment_bytes) ? 8 : 1;
  plan.vecs = rows * (dim / plan.elems);
  plan.ctas = ceil_div(plan.vecs, kConfigs[plan.config].vecs * kConfigs[plan.config].threads);
  return plan;
}

}  // namespace infuse::gated_backward
