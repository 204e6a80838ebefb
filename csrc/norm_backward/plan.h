// How a problem is cut up: the table of configurations, the heuristic, and the plan that a configuration gives for a
// problem. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::norm_backward {

enum class Form { kRmsNorm, kLayerNorm, kGatedRmsNorm };

// One way to launch the ring kernel. Threads of a row and rows of a CTA follow from the problem; what a configuration
// can't take goes to the two-pass kernels, so each configuration takes every problem.
struct Config {
  const char* name;
  int vecs;         // vectors of a row that a thread holds, at most: 1, 2 or 4
  int cta_threads;  // at most, unless one row needs more
  int stages;       // rows in shared memory: all but one of them are on their way
  int ctas_per_sm;  // at most; every CTA writes a partial sum of the weight's gradient
};

constexpr Config kConfigs[] = {
    {"vecs2_512x1_stages2", 2, 512, 2, 1},    // 0
    {"vecs2_512x1_stages3", 2, 512, 3, 1},    // 1
    {"vecs2_256x2_stages3", 2, 256, 3, 2},    // 2
    {"vecs4_512x1_stages2", 4, 512, 2, 1},    // 3
    {"vecs4_128x4_stages4", 4, 128, 4, 4},    // 4
    {"vecs1_1024x1_stages3", 1, 1024, 3, 1},  // 5
    {"vecs2_256x1_stages2", 2, 256, 2, 1},
    {"vecs2_256x1_stages3", 2, 256, 3, 1},
    {"vecs2_256x2_stages2", 2, 256, 2, 2},
    {"vecs1_512x1_stages2", 1, 512, 2, 1},
    {"vecs1_512x1_stages3", 1, 512, 3, 1},
    {"vecs1_512x2_stages2", 1, 512, 2, 2},
    {"vecs2_128x4_stages2", 2, 128, 2, 4},
    {"vecs2_128x2_stages3", 2, 128, 3, 2},
    {"vecs4_256x2_stages2", 4, 256, 2, 2},
    {"vecs4_256x1_stages2", 4, 256, 2, 1},
    {"vecs4_128x2_stages2", 4, 128, 2, 2},
    {"vecs2_384x1_stages2", 2, 384, 2, 1},
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

// Of the ring kernel, whose threads hold the weight and an fp32 sum for each of their elements, two if centered.
constexpr int kMaxVecs = 4;
// 0: no such kernel.
constexpr int max_cta_threads(int vecs, Form form) {
  if (vecs == 1) return form == Form::kRmsNorm ? 1024 : 768;
  return vecs == kMaxVecs && form != Form::kRmsNorm ? 0 : 512;
}
constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowGroups = 15;        // of more than one warp, which need a barrier each
constexpr int kStatisticsBytes = 2 * 4;  // of a thread and stage

// The two-pass kernels: threads of a row's sums, threads of a column block, rows that a column block's parts share.
constexpr int kRowThreads = 256;
constexpr int kColumnThreads = 128;
constexpr int kColumnCtasPerSm = 8;

struct Problem {
  std::int64_t rows;
  std::int64_t dim;
  int size_bytes;       // of an element of every tensor with rows
  int alignment_bytes;  // every address of a row's start, of any of them, is a multiple of it
  int weight_size_bytes;  // 0 without a weight
  int weight_alignment_bytes;
  int num_tensors;  // with rows that are read
  Form form;
};

struct Device {
  int num_sms;
  int max_shared_bytes;  // of a CTA
};

struct Plan {
  int config;           // index into kConfigs
  int vec_elems;        // elements of an access
  int vecs_per_thread;  // 1, 2 or 4; 0: two passes, and what follows is 0
  int threads_per_row;  // 8, 16 or a multiple of 32
  int rows_per_cta;
  int shared_bytes;
};

constexpr int choose_vec_elems(const Problem& problem) {
  const int elems = kVectorBytes / problem.size_bytes;
  const bool wide = problem.dim % elems == 0 && is_aligned(elems, problem.size_bytes, problem.alignment_bytes) &&
                    is_aligned(elems, problem.weight_size_bytes, problem.weight_alignment_bytes);
  return wide ? elems : 1;
}

constexpr int choose_threads(std::int64_t row_vecs, int vecs) {
  const std::int64_t least = ceil_div(row_vecs, vecs);
  return least <= 8 ? 8 : least <= 16 ? 16 : static_cast<int>(ceil_div(least, 32) * 32);
}

// Fills in the rest of a plan, if the configuration takes the problem.
constexpr Plan try_config(Plan plan, const Problem& problem, const Device& device) {
  const Config& config = kConfigs[plan.config];
  const std::int64_t row_vecs = problem.dim / plan.vec_elems;
  if (row_vecs > std::int64_t{config.vecs} * kMaxRowThreads) return plan;
  const int threads = choose_threads(row_vecs, config.vecs);
  int rows = config.cta_threads > threads ? config.cta_threads / threads : 1;
  if (threads > 32) rows = smaller(rows, kMaxRowGroups);
  const int bytes = config.stages * threads * rows * (problem.num_tensors * config.vecs * kVectorBytes + kStatisticsBytes);
  if (threads * rows > max_cta_threads(config.vecs, problem.form) || bytes > device.max_shared_bytes) return plan;
  plan.vecs_per_thread = config.vecs;
  plan.threads_per_row = threads;
  plan.rows_per_cta = rows;
  plan.shared_bytes = bytes;
  return plan;
}

// On an H200 it is best to have 26 to 32 KiB on their way to each SM: with more the kernel slows down by a tenth. So
// two stages if these are enough, else three; four vectors a thread only where two do not hold the row; and smaller
// CTAs, which end sooner, when there are few rows.
constexpr int kEnoughBytes = 26 * 1024;
constexpr int choose_config(const Problem& problem, std::int64_t row_vecs, const Device& device) {
  if (row_vecs > 2 * kMaxRowThreads) return 3;
  const int threads = choose_threads(row_vecs, 2);
  const std::int64_t rows = threads < 512 ? 512 / threads : 1;
  if (problem.rows <= rows * device.num_sms) return 2;
  return problem.num_tensors * rows * problem.dim * problem.size_bytes >= kEnoughBytes ? 0 : 1;
}

// `config` is kHeuristic or an index into kConfigs.
constexpr Plan make_plan(const Problem& problem, int config, const Device& device) {
  Plan plan{};
  plan.vec_elems = choose_vec_elems(problem);
  const std::int64_t row_vecs = problem.dim / plan.vec_elems;
  const bool aligned = plan.vec_elems * problem.size_bytes == kVectorBytes;
  plan.config = config != kHeuristic ? config : aligned ? choose_config(problem, row_vecs, device) : 0;
  if (!aligned) return plan;
  const Plan found = try_config(plan, problem, device);
  if (found.vecs_per_thread > 0 || config != kHeuristic) return found;
  // Shared memory for a smaller ring is what some devices lack.
  plan.config = 2;
  return try_config(plan, problem, device);
}

// Sums over some rows each that the launch may write: as many as there are CTAs, at most, for a block of columns.
constexpr int max_parts(const Plan& plan, const Problem& problem, const Device& device) {
  std::int64_t most = 0, useful = problem.rows;
  if (plan.vecs_per_thread > 0) {
    most = std::int64_t{kConfigs[plan.config].ctas_per_sm} * device.num_sms;
    useful = ceil_div(problem.rows, plan.rows_per_cta);
  } else {
    const std::int64_t column_ctas = ceil_div(problem.dim / plan.vec_elems, kColumnThreads);
    most = ceil_div(std::int64_t{kColumnCtasPerSm} * device.num_sms, column_ctas);
  }
  return static_cast<int>(most < useful ? most : useful);
}

}  // namespace infuse::norm_backward
