// How a problem is cut up: the table of configurations, the heuristic, and the plan that a configuration gives for a
// problem. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::rms_norm {

// One way to launch. The rest (vectors a thread, vector width) follows from the problem, so each configuration takes
// every problem.
struct Config {
  const char* name;
  int threads_per_row;  // power of two, 8 to 1024
  int rows_per_cta;
  bool persistent;  // a CTA walks over many rows and loads the next row while it works on this one
};

constexpr Config kConfigs[] = {
    {"row8x16", 8, 16, false},          //  0: four rows a warp, head_dim 64 to 256
    {"row32x4", 32, 4, false},          //  1: a warp a row, no barrier
    {"row64x2", 64, 2, false},          //  2
    {"row128", 128, 1, false},          //  3
    {"row256", 256, 1, false},          //  4
    {"row512", 512, 1, false},          //  5
    {"row1024", 1024, 1, false},        //  6
    {"row8x16_persistent", 8, 16, true},    //  7
    {"row32x4_persistent", 32, 4, true},    //  8
    {"row128_persistent", 128, 1, true},    //  9
    {"row256_persistent", 256, 1, true},    // 10
    {"row512_persistent", 512, 1, true},    // 11
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

// How many 16-byte vectors of a row a thread may hold, so that the row stays in registers: the fewer threads a CTA has,
// the more registers each can have.
constexpr int max_vecs_per_thread(int cta_threads) { return cta_threads <= 256 ? 16 : cta_threads <= 512 ? 8 : 4; }
constexpr int max_cta_threads(int vecs) { return vecs > 8 ? 256 : vecs > 4 ? 512 : 1024; }
// A persistent kernel holds two rows.
constexpr int kMaxVecsPersistent = 4;
constexpr int kMaxPersistentThreads = 512;

struct Problem {
  std::int64_t rows;
  std::int64_t dim;
  int x_size_bytes;  // of one element
  // Every address of a row's start, in bytes, is a multiple of these (gcd of pointers and row strides).
  int x_alignment_bytes;
  int out_alignment_bytes;
  int weight_alignment_bytes;
  int out_size_bytes;
  int weight_size_bytes;  // 0 without a weight
};

struct Plan {
  int config;           // index into kConfigs
  int vec_elems;        // elements of an access
  int vecs_per_thread;  // 0: the row does not fit in registers, or is not aligned; read it twice
  bool persistent;
};

// The widest access that divides the rows and fits the alignment of all three tensors: 16 bytes of x, 4 bytes, or
// one element.
constexpr int choose_vec_elems(const Problem& problem) {
  const int candidates[] = {kVectorBytes / problem.x_size_bytes, 4 / problem.x_size_bytes};
  for (const int elems : candidates) {
    if (problem.dim % elems == 0 && is_aligned(elems, problem.x_size_bytes, problem.x_alignment_bytes) &&
        is_aligned(elems, problem.out_size_bytes, problem.out_alignment_bytes) &&
        is_aligned(elems, problem.weight_size_bytes, problem.weight_alignment_bytes)) {
      return elems;
    }
  }
  return 1;
}

// Four vectors a thread when there are rows enough to fill the machine (fewer threads meet at the barrier), fewer
// when there are not (a short row should then be spread over more threads, for latency).
constexpr int choose_config(std::int64_t rows, std::int64_t row_vecs, int num_sms) {
  const std::int64_t threads_to_fill = std::int64_t{1024} * num_sms;
  int vecs_per_thread = 4;
  while (vecs_per_thread > 1 && rows * row_vecs / vecs_per_thread < threads_to_fill) vecs_per_thread /= 2;
  const std::int64_t threads_per_row = ceil_div(row_vecs, vecs_per_thread);
  int best = 0;
  for (int i = 0; i < kNumConfigs; ++i) {
    if (kConfigs[i].persistent) continue;
    best = i;  // the table is sorted; the last one takes what is longer
    if (kConfigs[i].threads_per_row >= threads_per_row) break;
  }
  return best;
}

// Power of two of vectors a thread that holds a row, 0 if that is more than `most`.
constexpr int choose_vecs_per_thread(std::int64_t row_vecs, int threads_per_row, int most) {
  for (int vecs = 1; vecs <= most; vecs *= 2) {
    if (row_vecs <= std::int64_t{vecs} * threads_per_row) return vecs;
  }
  return 0;
}

// `config` is kHeuristic or an index into kConfigs.
constexpr Plan make_plan(const Problem& problem, int config, int num_sms) {
  Plan plan{};
  plan.vec_elems = choose_vec_elems(problem);
  const std::int64_t row_vecs = problem.dim / plan.vec_elems;
  plan.config = config == kHeuristic ? choose_config(problem.rows, row_vecs, num_sms) : config;
  // Narrow accesses have no kernel that keeps the row in registers: too many vectors.
  if (plan.vec_elems * problem.x_size_bytes != kVectorBytes) return plan;

  const Config& chosen = kConfigs[plan.config];
  const int most = max_vecs_per_thread(chosen.threads_per_row * chosen.rows_per_cta);
  plan.vecs_per_thread = choose_vecs_per_thread(row_vecs, chosen.threads_per_row, most);
  // A row too long to be held twice goes through the kernel that holds it once.
  plan.persistent = chosen.persistent && plan.vecs_per_thread > 0 && plan.vecs_per_thread <= kMaxVecsPersistent;
  return plan;
}

}  // namespace infuse::rms_norm
