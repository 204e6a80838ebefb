// Which kernel computes a gated linear. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::gated_linear {

// columns: of the result, of a tile of 128 rows. cluster_rows, cluster_columns: tiles of the CTAs that share loads.
// section: see gemm/order.cuh. is_mma: by mma.sync, which every device has.
struct Config {
  const char* name;
  int columns;
  int cluster_rows, cluster_columns;
  int section;
  bool is_mma = false;
};

constexpr Config kConfigs[] = {
    {"wgmma_128x128_pairs", 128, 2, 1, 8},    // 0
    {"wgmma_128x128_across", 128, 1, 2, 16},  // 1: pairs along the columns
    {"wgmma_128x128_alone", 128, 1, 1, 16},   // 2
    {"wgmma_128x112_pairs", 112, 2, 1, 8},    // 3
    {"wgmma_128x112_across", 112, 1, 2, 16},  // 4
    {"wgmma_128x112_alone", 112, 1, 1, 16},   // 5
    {"mma_128x64", 64, 1, 1, 16, true},       // 6
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1, kMma = kNumConfigs - 1;
constexpr int kTileRows = 128;  // of wgmma

struct Problem {
  std::int64_t rows, columns, dim, groups;
  bool has_groups, by_columns;
};

struct Device {
  int num_sms;
  int shared_bytes;  // that a CTA can have
  bool has_wgmma;    // and the library has code for it
};

// Why a configuration cannot run, or null.
constexpr const char* obstacle(const Problem& problem, const Config& config, const Device& device) {
  if (config.is_mma) return nullptr;
  if (!device.has_wgmma) return "a device or a library without 9.0a";
  if (problem.by_columns && config.columns % 64 != 0) return "weights that lie by columns";
  return nullptr;
}

// What a configuration takes, in columns of tiles that an SM computes one after the other, times 100. Groups are taken to
// be of one size on average, so that their last tiles are half full. What loads cost that CTAs do not share is from
// measurements on an H200.
constexpr std::int64_t cost(const Problem& problem, const Config& config, const Device& device) {
  const int cluster = config.cluster_rows * config.cluster_columns;
  const std::int64_t unit_rows = std::int64_t{kTileRows} * config.cluster_rows;
  const std::int64_t column_units = ceil_div(problem.columns, std::int64_t{config.columns} * config.cluster_columns);
  const int percent = config.cluster_rows > 1 ? 100 : config.cluster_columns > 1 ? 102 : 101;
  if (problem.has_groups) {
    const std::int64_t rows = problem.rows + problem.groups * unit_rows / 2;
    return rows * column_units * cluster * config.columns * percent / (unit_rows * device.num_sms);
  }
  const std::int64_t units = ceil_div(problem.rows, unit_rows) * column_units;
  return ceil_div(units, device.num_sms / cluster) * config.columns * percent;
}

constexpr int choose(const Problem& problem, const Device& device) {
  int best = kMma;
  for (int i = 0; i < kNumConfigs && device.has_wgmma; ++i) {
    if (kConfigs[i].is_mma || obstacle(problem, kConfigs[i], device) != nullptr) continue;
    if (best == kMma || cost(problem, kConfigs[i], device) < cost(problem, kConfigs[best], device)) best = i;
  }
  return best;
}

}  // namespace infuse::gated_linear
