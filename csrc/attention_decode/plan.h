// How a problem is cut up. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::attention_decode {

constexpr int kWarpRows = 16;  // of a warp: rows of a tensor-core tile
constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a CTA
constexpr std::int64_t kMaxTiles = 1 << 16;   // two bits each in shared memory
constexpr int kMaxCluster = 8;  // what every device with clusters has
constexpr int kMaxTilesOfClusterWarp = 2;
constexpr int kMaxSplits = 1024;
constexpr int kReservedBytes = 1024;  // of shared memory, for each CTA

// tile: keys; stages: tiles that a group of warps has under way or in use.
struct Config {
  const char* name;
  int tile, stages;
};

constexpr Config kConfigs[] = {
    {"tile16_s3", 16, 3},  // 0
    {"tile32_s4", 32, 4},  // 1: for many rows, whose warps share a ring
    {"tile16_s2", 16, 2},  // 2: for devices with less shared memory
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1;

struct Problem {
  std::int64_t batch, kv_heads, rows;  // rows: queries * heads of a group
  std::int64_t keys;
  int dim, dim_v;
  int mask_size_bytes;  // of an element, 0 without a mask
};

struct Device {
  int num_sms;
  int shared_bytes;  // that a CTA can have
  bool has_clusters;
};

struct Plan {
  int config;
  int dim;        // the kernel's: 64, 128 or 256
  int tile;       // keys
  int row_warps;  // 1, 2 or 4
  int row_blocks;
  int splits;
  bool cluster;  // the splits are one cluster
  int shared_bytes, bits_offset;
  std::int64_t tiles;
};

constexpr int padded_dim(int dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// An odd number of 16-byte pieces, so that the eight rows of a matrix lie in different banks.
constexpr int row_bytes(int dim) { return 2 * dim + 16; }

constexpr int stage_bytes(int dim, int tile, int row_warps, int mask_size_bytes) {
  return 2 * tile * row_bytes(dim) + row_warps * kWarpRows * tile * mask_size_bytes;
}

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Queries, then either the ring of every group of warps or, once that is no longer needed, the sums that are merged;
// then two bits for each tile.
constexpr int ring_offset(int dim, int row_warps) { return row_warps * kWarpRows * row_bytes(dim); }

constexpr int bits_offset(int dim, const Config& config, int tile, int row_warps, int mask_size_bytes) {
  const int ring = kWarps / row_warps * config.stages * stage_bytes(dim, tile, row_warps, mask_size_bytes);
  const int sums = kWarps * kWarpRows * (dim + 4) * 4;
  return ring_offset(dim, row_warps) + larger(ring, sums);
}

constexpr int choose_config(const Device& device, int row_warps) {
  if (device.shared_bytes < 120 * 1024) return 2;
  return row_warps == 4 ? 1 : 0;
}

// CTAs on an SM at once, by shared memory; registers suffice for two.
constexpr int ctas_of_sm(const Plan& plan, const Device& device) {
  return 2 * (plan.shared_bytes + kReservedBytes) <= device.shared_bytes + kReservedBytes ? 2 : 1;
}

// As many splits as fill the device once, while each warp still has a tile.
constexpr int choose_splits(const Problem& problem, const Plan& plan, const Device& device) {
  const std::int64_t heads = problem.batch * problem.kv_heads * plan.row_blocks;
  const std::int64_t slots = static_cast<std::int64_t>(device.num_sms) * ctas_of_sm(plan, device);
  const std::int64_t most = ceil_div(plan.tiles, kWarps / plan.row_warps), wanted = slots / heads;
  const std::int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

constexpr int shared_bytes_before_bits(const Problem& problem, const Config& config, const Plan& plan) {
  return bits_offset(plan.dim, config, plan.tile, plan.row_warps, problem.mask_size_bytes);
}

// config, splits: kHeuristic and 0 let the plan choose.
constexpr Plan make_plan(const Problem& problem, int config, int splits, const Device& device) {
  Plan plan{};
  plan.dim = padded_dim(larger(problem.dim, problem.dim_v));
  plan.row_warps = problem.rows <= kWarpRows ? 1 : problem.rows <= 2 * kWarpRows ? 2 : 4;
  plan.config = config == kHeuristic ? choose_config(device, plan.row_warps) : config;
  const Config& chosen = kConfigs[plan.config];
  plan.tile = plan.dim > 128 ? 16 : chosen.tile;
  plan.tiles = ceil_div(problem.keys, plan.tile);
  const int bits_bytes = 2 * 4 * static_cast<int>(ceil_div(plan.tiles, 32));
  // Fewer rings than warps could have where a ring for each is too much; some warps then have no rows.
  while (plan.row_warps < kWarps &&
         shared_bytes_before_bits(problem, chosen, plan) + bits_bytes > device.shared_bytes) {
    plan.row_warps *= 2;
  }
  plan.bits_offset = shared_bytes_before_bits(problem, chosen, plan);
  plan.shared_bytes = plan.bits_offset + bits_bytes;
  plan.row_blocks = static_cast<int>(ceil_div(problem.rows, plan.row_warps * kWarpRows));
  plan.splits = splits > 0 ? splits : choose_splits(problem, plan, device);
  const std::int64_t heads = problem.batch * problem.kv_heads * plan.row_blocks;
  // Few tiles: a cluster of CTAs, one an SM, ends sooner than a second kernel. A larger grid of clusters leaves SMs idle.
  const int size = plan.splits < kMaxCluster ? plan.splits : kMaxCluster;
  plan.cluster = device.has_clusters && size > 1 && size * heads <= device.num_sms &&
                 plan.tiles <= kMaxTilesOfClusterWarp * size * (kWarps / plan.row_warps);
  if (plan.cluster) plan.splits = size;
  return plan;
}

}  // namespace infuse::attention_decode
