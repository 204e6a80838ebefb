// How a problem is cut up. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "attention_forward/wgmma_tiles.h"
#include "infuse/access.h"

namespace infuse::attention_forward {

constexpr int kTile = 64;  // keys; also of a tile of the map
constexpr int kMaxSplits = 64;
constexpr int kMinTilesOfSplit = 4;
constexpr int kReservedBytes = 1024;  // of shared memory, for each CTA

// wgmma: made for 9.0a alone; wide: with larger tiles of keys. warps: of a CTA; with wgmma those that multiply. stages:
// tiles of K and V in shared memory; with one, a tile of V is loaded while that of K is multiplied, and the other way
// round.
struct Config {
  const char* name;
  bool wgmma;
  int warps, stages;
  bool wide = false;
};

constexpr Config kConfigs[] = {
    {"mma_w4_s2", false, 4, 2},  // 0
    {"mma_w4_s1", false, 4, 1},  // 1: for devices with less shared memory
    {"mma_w8_s2", false, 8, 2},  // 2
    {"mma_w8_s1", false, 8, 1},  // 3
    {"mma_w2_s2", false, 2, 2},  // 4: for few rows
    {"wgmma_w8", true, 8, 2},             // 5
    {"wgmma_w8_wide", true, 8, 2, true},  // 6: for many keys
    {"wgmma_w12", true, 12, 2},           // 7: for narrow heads
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

struct Problem {
  std::int64_t batch, heads, kv_heads, queries, keys;
  int dim, dim_v;
  bool is_causal;
  bool has_mask, has_map, has_dropout, has_softcap;
  bool has_expanded;  // q, k or v has the stride 0 along a dimension of more than 1
};

struct Device {
  int num_sms;
  int shared_bytes;  // that a CTA can have
  int major;         // of the compute capability
  bool has_wgmma;    // and the library has code for it
};

struct Plan {
  int config;
  int dim;   // the kernel's
  int rows;  // of a CTA
  int row_blocks;
  int splits;
  int shared_bytes;
};

constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int padded_dim(int dim) {
  return dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : dim <= 192 ? 192 : 256;
}

// Of a warp: two tensor-core tiles, as long as the sums of both fit into registers.
constexpr int warp_rows(int dim) { return dim <= 128 ? 32 : 16; }

// Of a CTA. A kernel for four has registers for three CTAs on an SM, one for eight for one.
constexpr int max_warps(int dim, bool full) { return dim <= 64 && !full ? 4 : 8; }

// An odd number of 16-byte pieces, so that the eight rows of a matrix lie in different banks.
constexpr int row_bytes(int dim) { return 2 * dim + 16; }

// Queries, then the tiles of K and V.
constexpr int mma_shared_bytes(int dim, const Config& config) {
  return (config.warps * warp_rows(dim) + 2 * config.stages * kTile) * row_bytes(dim);
}

// Whether the kernel with masks, dropout and softcap is needed, which has registers for eight warps on an SM.
constexpr bool is_full(const Problem& problem, int dim, const Config& config) {
  return problem.has_mask || problem.has_dropout || problem.has_softcap || config.warps > max_warps(dim, false);
}

// CTAs of a configuration on an SM at once.
constexpr int ctas_of_sm(const Problem& problem, int dim, const Config& config, const Device& device) {
  const int by_memory = (device.shared_bytes + kReservedBytes) / (mma_shared_bytes(dim, config) + kReservedBytes);
  const int by_registers = (max_warps(dim, is_full(problem, dim, config)) == 4 ? 12 : 8) / config.warps;
  return by_memory < by_registers ? by_memory : by_registers;
}

constexpr bool fits(int config, int dim, const Device& device) {
  return mma_shared_bytes(dim, kConfigs[config]) <= device.shared_bytes;
}

// What keeps most warps on an SM, two stages before one.
constexpr int choose_mma(const Problem& problem, int dim, const Device& device) {
  const int few_rows = 2 * warp_rows(dim);
  if (problem.queries <= few_rows && fits(4, dim, device)) return 4;
  int best = 1, most_warps = 0;
  for (const int config : {0, 2, 1, 3}) {
    if (!fits(config, dim, device)) continue;
    const int warps = kConfigs[config].warps * ctas_of_sm(problem, dim, kConfigs[config], device);
    if (warps > most_warps) {
      best = config;
      most_warps = warps;
    }
  }
  return best;
}

// As many splits as fill the device once, while each has a few tiles.
constexpr int choose_splits(const Problem& problem, const Plan& plan, const Device& device) {
  const std::int64_t ctas = problem.batch * problem.heads * plan.row_blocks;
  const std::int64_t slots =
      static_cast<std::int64_t>(device.num_sms) * ctas_of_sm(problem, plan.dim, kConfigs[plan.config], device);
  const std::int64_t most = ceil_div(problem.keys, kTile) / kMinTilesOfSplit;
  std::int64_t splits = slots / ctas;
  splits = splits < most ? splits : most;
  splits = splits < kMaxSplits ? splits : kMaxSplits;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

constexpr int wgmma_keys(int dim, const Config& config) { return wgmma_keys(dim, config.warps, config.wide); }

// Why the wgmma kernel cannot run, or null. The copy engine cannot describe tensors that are expanded or empty.
constexpr const char* wgmma_obstacle(const Problem& problem, int dim, const Config& config, const Device& device) {
  if (!device.has_wgmma) return "a device or a library without 9.0a";
  if (problem.has_dropout) return "dropout";
  if (problem.has_expanded) return "expanded tensors";
  if (problem.keys == 0) return "no keys";
  if (wgmma_keys(dim, config) == 0) return "another head_dim";
  return nullptr;
}

// Measured on an H200, causal, bfloat16: at head_dim 128 wide tiles are 3% faster with 16384 keys and 2% slower with
// 4096, where more of them lie on the diagonal; at 96 twelve warps are 9% faster and 2% slower.
constexpr int choose_wgmma_of(const Problem& problem, int dim) {
  const bool is_long = problem.keys >= 8192 && problem.queries >= 8192 && !problem.has_mask;
  if (dim == 128) return is_long ? 6 : 5;
  return dim == 64 || (dim == 96 && is_long) ? 7 : 5;
}

// Configuration of the wgmma kernel, or kHeuristic where the other one is better: few tiles leave SMs idle that splits
// would keep busy.
constexpr int choose_wgmma(const Problem& problem, int dim, const Device& device) {
  const int config = choose_wgmma_of(problem, dim);
  if (wgmma_obstacle(problem, dim, kConfigs[config], device) != nullptr) return kHeuristic;
  const std::int64_t tiles = problem.batch * problem.heads * ceil_div(problem.queries, 16 * kConfigs[config].warps);
  return problem.queries > 64 && 2 * tiles >= device.num_sms ? config : kHeuristic;
}

constexpr Plan plan_wgmma(const Problem& problem, int dim, int config) {
  Plan plan{};
  plan.config = config;
  plan.dim = dim;
  plan.rows = 16 * kConfigs[config].warps;
  plan.row_blocks = static_cast<int>(ceil_div(problem.queries, plan.rows));
  plan.splits = 1;
  plan.shared_bytes = wgmma_shared_bytes(dim, plan.rows, wgmma_keys(dim, kConfigs[config]));
  return plan;
}

// config, splits: kHeuristic and 0 let the plan choose. A configuration for which shared_bytes is more than the device
// has cannot run, nor one of wgmma with an obstacle.
constexpr Plan make_plan(const Problem& problem, int config, int splits, const Device& device) {
  Plan plan{};
  plan.dim = padded_dim(larger(problem.dim, problem.dim_v));
  if (config == kHeuristic && splits <= 1) config = choose_wgmma(problem, plan.dim, device);
  if (config != kHeuristic && kConfigs[config].wgmma) return plan_wgmma(problem, plan.dim, config);
  plan.config = config == kHeuristic ? choose_mma(problem, plan.dim, device) : config;
  const Config& chosen = kConfigs[plan.config];
  plan.rows = chosen.warps * warp_rows(plan.dim);
  plan.row_blocks = static_cast<int>(ceil_div(problem.queries, plan.rows));
  plan.shared_bytes = mma_shared_bytes(plan.dim, chosen);
  plan.splits = splits > 0 ? splits : choose_splits(problem, plan, device);
  return plan;
}

}  // namespace infuse::attention_forward
