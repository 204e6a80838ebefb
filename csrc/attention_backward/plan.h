// How a problem is cut up. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "attention_backward/wgmma_traits.h"
#include "infuse/access.h"

namespace infuse::attention_backward {

constexpr int kQueryBlock = 64;    // queries that a CTA works on at a time; also of a tile of the map
constexpr int kQueryPadding = 128;  // the workspace's rows of a head are a multiple
constexpr int kMaxSplits = 64;
constexpr int kReservedBytes = 1024;  // of shared memory, for each CTA

// wgmma: made for 9.0a alone. keys: of a CTA.
struct Config {
  const char* name;
  bool wgmma;
  int keys;
};

constexpr Config kConfigs[] = {
    {"mma_k128", false, 128},   // 0
    {"mma_k64", false, 64},     // 1: for large heads, or less shared memory, or small heads, of which two CTAs fit
    {"wgmma_k128", true, 128},  // 2: for the devices and arguments without wgmma_obstacle
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

struct Problem {
  std::int64_t batch, heads, kv_heads, queries, keys;
  int dim, dim_v;
  bool is_causal;
  bool has_mask, has_map, has_dropout, has_softcap;
  bool deterministic;
  bool scale_is_positive;
  bool has_expanded;  // q, k, v or dout has the stride 0 along a dimension of more than 1
};

struct Device {
  int num_sms;
  int shared_bytes;  // that a CTA can have
  bool has_wgmma;    // compute capability 9.0, and the library has code for 9.0a
};

struct Plan {
  int config;
  int dim;     // the kernel's, 0 where the configuration has none for the head
  int stages;  // of Q and dout in shared memory
  int splits;  // of the heads that share K and V
  int heads_at_once;
  int query_blocks, key_blocks;
  int padded_queries;
  int shared_bytes;
};

constexpr int larger(int a, int b) { return a > b ? a : b; }

// 0 where the sums of dk and dv of that many keys do not fit into registers.
constexpr int kernel_dim(const Config& config, int dim) {
  if (config.wgmma) return dim <= 64 ? 64 : dim <= 128 ? 128 : 0;
  if (config.keys == 128) return dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : 0;
  return dim <= 64 ? 64 : dim <= 128 ? 128 : dim <= 192 ? 192 : 256;
}

// An odd number of 16-byte pieces, so that the eight rows of a matrix lie in different banks.
constexpr int row_bytes(int dim) { return 2 * dim + 16; }

// K and V, P and dS, two stages of lse and delta, then those of Q and dout.
constexpr int mma_shared_bytes(int keys, int dim, int stages) {
  return 2 * keys * (row_bytes(dim) + row_bytes(kQueryBlock)) + 2 * kQueryBlock * 8 +
         stages * kQueryBlock * 2 * row_bytes(dim);
}

// Why the sm_90a kernel cannot run, or null. The copy engine describes no tensors that are expanded or empty.
constexpr const char* wgmma_obstacle(const Problem& problem, const Device& device) {
  if (!device.has_wgmma) return "a device or a library without 9.0a";
  if (larger(problem.dim, problem.dim_v) > 128) return "heads of more than 128";
  if (problem.queries == 0) return "no queries";
  if (problem.has_expanded) return "expanded tensors";
  if (!problem.scale_is_positive) return "a scale that is not positive";
  if (problem.has_dropout) return "dropout";
  if (problem.has_softcap) return "a softcap";
  return problem.deterministic ? "deterministic" : nullptr;
}

constexpr int choose_config(const Problem& problem, int dim, const Device& device) {
  if (wgmma_obstacle(problem, device) == nullptr) return 2;
  if (dim <= 64 && 2 * (mma_shared_bytes(64, 64, 2) + kReservedBytes) <= device.shared_bytes + kReservedBytes) return 1;
  const int wide = kernel_dim(kConfigs[0], dim);
  return wide != 0 && mma_shared_bytes(128, wide, 1) <= device.shared_bytes ? 0 : 1;
}

// CTAs that an SM holds, if its shared memory suffices; the registers are for 256 threads.
constexpr int ctas_of_sm(const Plan& plan) { return kConfigs[plan.config].keys == 64 && plan.dim == 64 ? 2 : 1; }

// More CTAs by fewer heads each, whose sums another kernel adds up, where not every SM would have one. In a fixed order
// the longest CTAs come last if attention is causal, so that they should be short.
constexpr int choose_splits(const Problem& problem, const Plan& plan, const Device& device) {
  const std::int64_t group = problem.heads / problem.kv_heads;
  const std::int64_t ctas = problem.batch * problem.kv_heads * plan.key_blocks;
  const std::int64_t slots = static_cast<std::int64_t>(device.num_sms) * ctas_of_sm(plan);
  const std::int64_t enough = problem.deterministic && problem.is_causal ? 4 * slots : slots;
  if (ctas == 0 || ctas >= enough) return 1;
  const std::int64_t wanted = ceil_div(2 * enough, ctas), most = group < kMaxSplits ? group : kMaxSplits;
  std::int64_t splits = wanted < most ? wanted : most;
  while (splits < most && group % splits != 0) ++splits;
  return static_cast<int>(splits);
}

// As few as fill the device twice: CTAs of one head read the same q and dout, and those of several heads differ less
// in what an SM finds to do when attention is causal.
constexpr int choose_heads_at_once(const Plan& plan, const Device& device) {
  return plan.key_blocks == 0 ? 1 : static_cast<int>(ceil_div(2 * device.num_sms * ctas_of_sm(plan), plan.key_blocks));
}

// config: kHeuristic lets the plan choose. A configuration for which dim is 0, or for which shared_bytes is more than
// the device has, cannot run.
constexpr Plan make_plan(const Problem& problem, int config, const Device& device) {
  Plan plan{};
  const int dim = larger(problem.dim, problem.dim_v);
  plan.config = config == kHeuristic ? choose_config(problem, dim, device) : config;
  const Config& chosen = kConfigs[plan.config];
  plan.dim = kernel_dim(chosen, dim);
  plan.stages = mma_shared_bytes(chosen.keys, plan.dim, 2) <= device.shared_bytes ? 2 : 1;
  plan.shared_bytes =
      chosen.wgmma ? wgmma_shared_bytes(plan.dim) : mma_shared_bytes(chosen.keys, plan.dim, plan.stages);
  plan.query_blocks = static_cast<int>(ceil_div(problem.queries, kQueryBlock));
  plan.key_blocks = static_cast<int>(ceil_div(problem.keys, chosen.keys));
  plan.padded_queries = static_cast<int>(ceil_div(problem.queries, kQueryPadding)) * kQueryPadding;
  plan.splits = chosen.wgmma ? 1 : choose_splits(problem, plan, device);
  plan.heads_at_once = choose_heads_at_once(plan, device);
  return plan;
}

}  // namespace infuse::attention_backward
