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
  int vecs;         // vectors of a row that a thread holds, at most: 2 or 4
  int cta_threads;  // at most, unless one row needs more
  int stages;       // rows in shared memory: all but one of them are on their way
  int ctas_per_sm;  // at most; every CTA writes a partial sum of the weight's gradient
  bool late;        // of the next row, only x is asked for before the row at hand was read once
};

constexpr Config kConfigs[] = {
    {"vecs2_512x1_stages2", 2, 512, 2, 1, false},      // 0
    {"vecs2_512x1_stages3", 2, 512, 3, 1, false},      // 1
    {"vecs2_256x2_stages3", 2, 256, 3, 2, false},      // 2
    {"vecs2_256x2_stages2", 2, 256, 2, 2, false},      // 3
    {"vecs2_384x1_stages2", 2, 384, 2, 1, false},      // 4
    {"vecs2_512x1_stages2_late", 2, 512, 2, 1, true},  // 5
    {"vecs4_512x1_stages2_late", 4, 512, 2, 1, true},  // 6
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

// Of the ring kernel, whose threads hold the weight and an fp32 sum for each of their elements, two if centered.
constexpr int kMaxVecs = 4;
// 0: no such kernel.
constexpr int max_cta_threads(int vecs, Form form) {
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
  int vecs_per_thread;  // 2 or 4; 0: two passes, and what follows is 0
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
// two stages if these are enough, else three; where they are too much, fewer short rows at once, or what is late. Four
// vectors a thread only where two do not hold the row, or would leave a third of the CTA's threads out; and smaller
// CTAs, which end sooner, when there are few rows.
constexpr int kEnoughBytes = 26 * 1024;
constexpr int kTooManyBytes = 40 * 1024;
constexpr int choose_config(const Problem& problem, std::int64_t row_vecs, const Device& device) {
  const int threads = choose_threads(row_vecs, 2);
  const bool has_wide = max_cta_threads(kMaxVecs, problem.form) > 0;
  if (row_vecs > 2 * kMaxRowThreads || (has_wide && threads > 256 && threads <= 384)) return 6;
  const std::int64_t rows = threads < 512 ? 512 / threads : 1;
  if (problem.rows <= rows * device.num_sms) return 2;
  const std::int64_t bytes = rows * problem.num_tensors * problem.dim * problem.size_bytes;
  if (bytes > kTooManyBytes) return threads <= 128 ? 4 : 5;
  return bytes >= kEnoughBytes ? 0 : 1;
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
  // Some devices lack the shared memory for it, and have it for a smaller ring.
  plan.config = 3;
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
