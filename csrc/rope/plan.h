// How a problem is cut up: the table of configurations, the heuristic, and the plan that a configuration gives for a
// problem. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::rope {

// A lane holds two vectors of a row, so that both elements of each of its pairs are its own, for `heads` heads of one
// position, which share the factors; `batches` times one after the other.
struct Config {
  const char* name;
  int heads;  // 1, 2 or 4
  int batches;
  int threads;  // of a CTA
};

constexpr Config kConfigs[] = {
    {"heads1x64", 1, 1, 64},    // 0: few rows, spread over many SMs
    {"heads2x64", 2, 1, 64},    // 1
    {"heads2x2x64", 2, 2, 64},  // 2
    {"heads4x2x64", 4, 2, 64},  // 3
    {"heads1x4x64", 1, 4, 64},  // 4
    {"heads4x64", 4, 1, 64},    // 5
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;
constexpr int kMaxThreads = 64;
constexpr int kWarpLanes = 32;
constexpr int kNarrowThreads = 128;
constexpr int kBackwardThreads = 256;
constexpr int kBackwardCtasPerSm = 2;  // with registers for that many
constexpr int kBackwardHeads = 8;      // that a group of lanes works on, one after the other, with the same factors

struct Problem {
  std::int64_t dim, rotary_dim;
  std::int64_t rows;           // of all parts
  std::int64_t heads;          // of the part that has most rows
  int x_size_bytes;            // of one element
  int alignment_bytes;         // of all row starts of x and out, in all parts
  int weight_size_bytes;       // 0 without
  int weight_alignment_bytes;  // of all weights
  bool has_norm;
  bool wide_factors;  // tables of float32 beside a narrower x
};

struct Plan {
  int config;  // index into kConfigs
  int heads;   // that a lane works on at a time
  int batches;
  int lanes;   // of a row, a power of two
  int groups;  // of lanes in a CTA
  bool narrow;  // one element at a time: odd sizes, or not aligned
};

// Lanes that hold a row, 0 if it cannot be cut into their vectors.
constexpr int lanes_of_row(const Problem& problem) {
  const int elems = kVectorBytes / problem.x_size_bytes;
  if (problem.dim % elems != 0 || problem.rotary_dim % (2 * elems) != 0) return 0;
  if (!is_aligned(elems, problem.x_size_bytes, problem.alignment_bytes) ||
      !is_aligned(elems, problem.weight_size_bytes, problem.weight_alignment_bytes)) {
    return 0;
  }
  const std::int64_t needed =
      problem.rotary_dim / (2 * elems) + ceil_div(problem.dim - problem.rotary_dim, 2 * elems);
  int lanes = 1;
  while (lanes < needed) lanes *= 2;
  return lanes <= kWarpLanes ? lanes : 0;
}

// Two heads at a time, four where the factors are wide and have to be converted or taken apart before they are used, and
// no batches: small CTAs that come and go keep more loads in flight than long ones. With few rows one head, so that all
// SMs work. The bounds are those of an H200 (benchmarks/rope.py).
constexpr int choose_config(const Problem& problem, int lanes, int num_sms) {
  if (problem.rows * lanes < std::int64_t{1024} * num_sms || problem.heads < 2) return 0;
  return problem.wide_factors ? 5 : 1;
}

// `config` is kHeuristic or an index into kConfigs.
constexpr Plan make_plan(const Problem& problem, int config, int num_sms) {
  Plan plan{};
  plan.lanes = lanes_of_row(problem);
  plan.narrow = plan.lanes == 0;
  if (plan.narrow) plan.lanes = kWarpLanes;
  plan.config = config == kHeuristic ? choose_config(problem, plan.lanes, num_sms) : config;
  plan.heads = plan.narrow ? 1 : kConfigs[plan.config].heads;
  plan.batches = plan.narrow ? 1 : kConfigs[plan.config].batches;
  plan.groups = (plan.narrow ? kNarrowThreads : kConfigs[plan.config].threads) / plan.lanes;
  return plan;
}

}  // namespace infuse::rope
