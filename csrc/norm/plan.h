// How a problem is cut up: the table of configurations, the heuristic, and the plan that a configuration gives for a
// problem. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::norm {

// What a row is combined with.
enum class Operand { kNone, kResidual, kGateBeforeNorm, kGateBehindNorm };

// One way to launch. The rest (vectors a thread, vector width) follows from the problem, so each configuration takes
// every problem.
struct Config {
  const char* name;
  int threads_per_row;  // power of two, 8 to 1024
  int rows_per_cta;
  bool is_ring = false;  // the kernel that keeps the row in shared memory
};

constexpr Config kConfigs[] = {
    {"row8x16", 8, 16},    // 0: four rows a warp
    {"row16x8", 16, 8},    // 1: two rows a warp, head_dim 128
    {"row32x4", 32, 4},    // 2: a warp a row, no barrier
    {"row64x2", 64, 2},    // 3
    {"row128", 128, 1},    // 4
    {"row256", 256, 1},    // 5
    {"row512", 512, 1},    // 6
    {"row1024", 1024, 1},  // 7
    {"ring1024", 1024, 1, true},  // 8: one CTA an SM that walks over the rows
};
constexpr int kRing = 8;
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

// How many 16-byte vectors of a row a thread may hold, so that the row (and what it is combined with) stays in
// registers, and how many threads a CTA of such a kernel may have. The two must agree.
constexpr int kMaxVecs = 4;
constexpr int max_cta_threads(int vecs, Operand operand, bool center) {
  if (operand == Operand::kNone) return center && vecs >= kMaxVecs ? 256 : 1024;
  return vecs >= kMaxVecs ? 512 : 1024;
}
constexpr int max_vecs_per_thread(int cta_threads, Operand operand, bool center) {
  int vecs = kMaxVecs;
  while (max_cta_threads(vecs, operand, center) < cta_threads) vecs /= 2;
  return vecs;
}

// Vectors of the rows to come that a thread of the ring kernel has under way. On an H200 it is up to 3% slower with one.
constexpr int kAhead = 2;

// Sizes in bytes of one element (0: the tensor is not there), and a power of two that divides the address of each row.
struct Access {
  int size_bytes;
  int alignment_bytes;
};

// CTAs on each SM up to which the next kernel may start early.
constexpr int kMaxEarlyCtas = 8;

struct Problem {
  std::int64_t rows;
  std::int64_t dim;
  Operand operand;
  bool center;
  Access x, others[5];  // the operand, out, sum, weight and bias, in any order
};

struct Plan {
  int config;            // index into kConfigs
  int vec_elems;         // elements of an access: 16 bytes of x, or one element
  int vecs_per_thread;   // 0: the row does not fit in registers, or is not aligned; read it twice
  int threads_per_row;   // the configuration's, less the warps that would have nothing to do
  bool lets_next_start;  // before this kernel has ended
  int shared_bytes;      // of the ring kernel; 0: another one
};

struct Device {
  int num_sms;
  int max_shared_bytes;  // dynamic, of a CTA
};
constexpr int kStaticSharedBytes = 1024;  // more than where the sums of rows meet takes

// Whether all tensors can be accessed by 16 bytes of x at a time.
constexpr bool is_vectorised(const Problem& problem) {
  const int elems = kVectorBytes / problem.x.size_bytes;
  bool aligned = problem.dim % elems == 0 && is_aligned(elems, problem.x.size_bytes, problem.x.alignment_bytes);
  for (const Access& other : problem.others) {
    aligned = aligned && is_aligned(elems, other.size_bytes, other.alignment_bytes);
  }
  return aligned;
}

// Of a vectorised problem; rows that don't fit in shared memory are read twice.
constexpr Plan plan_ring(Plan plan, const Problem& problem, std::int64_t row_vecs, const Device& device) {
  const std::int64_t vecs = ceil_div(row_vecs, kConfigs[kRing].threads_per_row);
  const std::int64_t threads = ceil_div(ceil_div(row_vecs, vecs), 32) * 32;
  const std::int64_t bytes = (vecs + kAhead) * threads * (problem.operand == Operand::kNone ? 1 : 2) * kVectorBytes;
  if (bytes > device.max_shared_bytes) return plan;
  plan.vecs_per_thread = static_cast<int>(vecs);
  plan.threads_per_row = static_cast<int>(threads);
  plan.shared_bytes = static_cast<int>(bytes);
  return plan;
}

// Rows that registers don't hold, or hold in too few CTAs to keep the memory busy, as with what a gate or a second sum
// needs besides. Not those of a LayerNorm alone: the ring has one CTA on an SM, whose three passes nothing hides.
constexpr bool prefers_ring(const Problem& problem, std::int64_t row_vecs, const Device& device) {
  const bool alone = problem.operand == Operand::kNone;
  const bool adds_only = problem.operand == Operand::kResidual && !problem.center;
  const int held = alone ? 2 * kMaxVecs * 512 : adds_only ? kMaxVecs * 512 : kMaxVecs * 256;
  const bool fits = plan_ring({}, problem, row_vecs, device).shared_bytes > 0;
  return is_vectorised(problem) && !(alone && problem.center) && row_vecs > held && fits;
}

// As measured on an H200 for bf16 rows of 128 to 262144 elements.
constexpr int choose_threads(const Problem& problem, std::int64_t row_vecs, int num_sms) {
  const bool alone = problem.operand == Operand::kNone;
  // Too long for the registers of 512 threads: read twice. A LayerNorm's two sums keep the memory waiting, so fewer
  // threads, of more CTAs, are better already where a row would just fit.
  if (row_vecs > 2 * kMaxVecs * 512) return alone ? 1024 : 512;
  if (row_vecs > kMaxVecs * 512) return alone ? 512 : 1024;
  if (problem.center && alone && row_vecs > kMaxVecs * 256) return 256;
  // Four vectors a thread when there are rows enough to fill the machine (fewer threads meet at the barrier), one or two
  // of both tensors of a residual add; two when there are not (a row should then be spread over more threads).
  const bool fills = problem.rows * row_vecs / 4 >= std::int64_t{1024} * num_sms;
  const int residual_vecs = row_vecs <= 512 && !problem.center ? 1 : 2;
  const int vecs = !fills ? 2 : problem.operand == Operand::kResidual ? residual_vecs : kMaxVecs;
  return static_cast<int>(ceil_div(row_vecs, vecs));
}

constexpr int choose_config(const Problem& problem, std::int64_t row_vecs, const Device& device) {
  if (prefers_ring(problem, row_vecs, device)) return kRing;
  const int threads = choose_threads(problem, row_vecs, device.num_sms);
  int best = 0;
  while (best + 1 < kRing && kConfigs[best].threads_per_row < threads) ++best;
  return best;  // these are sorted; the last one takes what is longer
}

// Power of two of vectors a thread that holds a row, 0 if that is more than `most`.
constexpr int choose_vecs_per_thread(std::int64_t row_vecs, int threads_per_row, int most) {
  for (int vecs = 1; vecs <= most; vecs *= 2) {
    if (row_vecs <= std::int64_t{vecs} * threads_per_row) return vecs;
  }
  return 0;
}

// `config` is kHeuristic or an index into kConfigs.
constexpr Plan make_plan(const Problem& problem, int config, const Device& device) {
  Plan plan{};
  const bool vectorised = is_vectorised(problem);
  plan.vec_elems = vectorised ? kVectorBytes / problem.x.size_bytes : 1;
  const std::int64_t row_vecs = problem.dim / plan.vec_elems;
  plan.config = config == kHeuristic ? choose_config(problem, row_vecs, device) : config;
  const Config& chosen = kConfigs[plan.config];
  // A CTA that waits for this kernel's end hides its launch, 0.3 of 2 us on an H200, but takes the place of one of this
  // kernel's: of many small ones that costs 20%.
  plan.lets_next_start = ceil_div(problem.rows, chosen.rows_per_cta) <= std::int64_t{kMaxEarlyCtas} * device.num_sms;
  plan.threads_per_row = chosen.threads_per_row;
  // Narrow accesses have no kernel that keeps the row in registers: too many vectors.
  if (!vectorised) return plan;
  if (chosen.is_ring) return plan_ring(plan, problem, row_vecs, device);
  const int most = max_vecs_per_thread(chosen.threads_per_row * chosen.rows_per_cta, problem.operand, problem.center);
  plan.vecs_per_thread = choose_vecs_per_thread(row_vecs, chosen.threads_per_row, most);
  if (plan.vecs_per_thread > 0 && chosen.threads_per_row > 32) {
    plan.threads_per_row = static_cast<int>(ceil_div(ceil_div(row_vecs, plan.vecs_per_thread), 32)) * 32;
  }
  return plan;
}

}  // namespace infuse::norm
