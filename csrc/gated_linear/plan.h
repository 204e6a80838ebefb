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
    {"wgmma_128x128_pairs", 128, 2, 1, 8},   // 0
    {"wgmma_128x128_across", 128, 1, 2, 16},  // 1: pairs along the columns
    {"wgmma_128x128_alone", 128, 1, 1, 16},  // 2
    {"wgmma_128x128_fours", 128, 2, 2, 8},   // 3
    {"wgmma_128x112_pairs", 112, 2, 1, 8},   // 4
    {"wgmma_128x112_across", 112, 1, 2, 16},  // 5
    {"wgmma_128x112_alone", 112, 1, 1, 16},  // 6
    {"mma_128x64", 64, 1, 1, 16, true},      // 7
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kHeuristic = -1, kMma = 7;

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

constexpr int choose(const Problem& problem, const Device& device) {
  if (!device.has_wgmma) return kMma;
  if (problem.rows <= 128) return problem.by_columns ? 2 : 6;
  return problem.by_columns || problem.rows > 1024 ? 0 : 4;
}

}  // namespace infuse::gated_linear
