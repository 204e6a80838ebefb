// How a problem is cut up: the table of configurations, the heuristic, and the plan that a configuration gives for a
// problem. Plain C++ without CUDA, so that it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"

namespace infuse::skinny_linear {

constexpr int kHeuristic = -1;
constexpr int kMaxRows = 64;
constexpr int kBlockColumns = 64;    // of x and of the weights, rows of 128 bytes in shared memory
constexpr int kBlockRowBytes = 128;
constexpr int kGroupRows = 64;       // features of a warpgroup's product
constexpr int kMaxGroups = 2;
constexpr int kSmallTileRows = 64;   // of a tile whose weights warps load ahead
constexpr int kRingWarps = kMaxGroups * 4;  // that multiply
constexpr int kMaxStages = 8;
constexpr int kMaxBlocks = 8;
constexpr int kSharedAlignment = 1024;
constexpr int kInboxBarrierBytes = 16;  // the last of the barriers
constexpr int kBytesOfBarriers = 2 * kMaxStages * 8 + kInboxBarrierBytes;
constexpr int kMaxKeptRows = 8;
constexpr int kMaxKeptBytes = 32 * 1024;
constexpr int kNormThreads = 256, kMaxNormBytes = 40 * 1024;  // of the norm as a kernel of its own
constexpr int kRowWarps = 8, kMaxRowPieces = 4;  // of the kernel for one row
constexpr int kMostBoxBlocks = 256;  // of a copy
constexpr int kMmaTileRows = 32, kMmaStageColumns = 128, kMmaStages = 4;

// A CTA's shared memory, at most: all of an SM's, or what two CTAs of an SM can have each. Two small tiles on an SM even
// out that some SMs get more of the memory's bandwidth than others; so does, less well, a ring that is twice as long.
constexpr int kHalfBytes = 112 * 1024, kAllBytes = 224 * 1024;
constexpr int kMinStageBytes = 12 * 1024;
constexpr std::int64_t kFewBytes = 24 * 1024 * 1024;  // of weights, read in about the time of a launch

// splits: CTAs that share the columns. most_rows: features of a tile. keeps_x: x is normalised in every CTA and stays in
// shared memory, if it is small; otherwise it comes with the weights, normalised by a kernel of its own. by_row: the
// kernel for one row, where that can be.
struct Config {
  const char* name;
  bool is_wgmma;
  int splits, most_rows, shared_bytes;
  bool keeps_x, by_row = false;
};
constexpr Config kConfigs[] = {
    {"wgmma_1_large", true, 1, 128, kAllBytes, true}, {"wgmma_1", true, 1, 64, kHalfBytes, true},
    {"wgmma_2_large", true, 2, 128, kAllBytes, true}, {"wgmma_2", true, 2, 32, kHalfBytes, true},
    {"wgmma_4", true, 4, 64, kHalfBytes, true},       {"wgmma_8", true, 8, 64, kHalfBytes, true},
    {"wgmma_1_streamed", true, 1, 128, kHalfBytes, false},
    {"row", true, 1, 64, kAllBytes, true, true},
    {"mma", false, 1, 0, 0, false},
};
enum { kOneLarge, kOne, kTwoLarge, kTwo, kFour, kRow = 7 };
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kMmaConfig = kNumConfigs - 1;

struct Device {
  int num_sms;
  int shared_bytes;  // that a CTA can have
  bool has_wgmma;
};

struct Problem {
  std::int64_t rows, dim;
  int num_weights;
  std::int64_t features[3];
  bool is_gated;  // the first two are gate and up of one result
  bool has_norm;
  bool norm_weight_is_fp32;
};

struct Plan {
  int config;
  bool is_wgmma, keeps_x, by_row;
  bool makes_way;    // the next kernel may start, and load its weights, before this one has loaded all of its own
  bool norms_first;  // in a kernel before this one
  int norm_bytes;    // of that kernel's shared memory; 0 leaves it to csrc/norm
  int columns;    // of a product: the rows of x, filled up
  int warps;          // that multiply
  int row_pieces;     // of 8 columns of one row, of a lane
  int column_groups;  // of them, that share the columns
  int tile_rows;  // features of a tile
  std::int64_t tiles, first_tile[3];
  int splits;
  int blocks, stages, stage_bytes, x_offset;
  std::int64_t iterations;
  int kept_x_offset, norm_weight_offset, barrier_offset, shared_bytes;
};

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int rounded_up(std::int64_t value, int step) { return static_cast<int>(ceil_div(value, step)) * step; }

constexpr int padded_rows(std::int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

// Linears that have results of their own.
constexpr int num_outputs(const Problem& problem) { return problem.is_gated ? 1 : problem.num_weights; }

// Numbers the tiles of all linears through.
constexpr void number_tiles(const Problem& problem, Plan* plan) {
  plan->tiles = 0;
  for (int i = 0; i < 3; ++i) {
    plan->first_tile[i] = i < num_outputs(problem) ? plan->tiles : std::int64_t{1} << 31;
    if (i < num_outputs(problem)) plan->tiles += ceil_div(problem.features[i], plan->tile_rows);
  }
}

// Features for each SM.
constexpr std::int64_t share_of_sm(const Problem& problem, const Device& device) {
  std::int64_t features = 0;
  for (int i = 0; i < num_outputs(problem); ++i) features += problem.features[i];
  return ceil_div(features, device.num_sms);
}

// Features of a tile so that all SMs have as many tiles: one, or as few as `most` allows.
constexpr int choose_tile_rows(const Problem& problem, int splits, int most, const Device& device) {
  const std::int64_t share = share_of_sm(problem, device) * splits, parts = ceil_div(share, most);
  return larger(rounded_up(ceil_div(share, parts > 0 ? parts : 1), 8), 8);
}

// Features that products read beyond the last of the tile.
constexpr int overrun_rows(const Plan& plan) {
  const int step = plan.columns <= kMaxKeptRows ? 16 : kGroupRows;
  return rounded_up(plan.tile_rows, step) - plan.tile_rows;
}

// Sums that the CTAs of a cluster send to one of them, in pieces of 2 or 4.
constexpr int inbox_bytes(const Problem& problem, const Plan& plan) {
  if (plan.splits == 1) return 0;
  const int width = plan.columns <= kMaxKeptRows ? 2 : 4, operands = problem.is_gated ? 2 : 1;
  const std::int64_t pieces = problem.rows * plan.tile_rows / width;
  return rounded_up(pieces, plan.splits) * operands * width * 4;
}

// Stages of the ring and where things lie. x, if it is kept, and the norm's weight come behind the ring, also behind what
// products read beyond the last tile.
constexpr void place_wgmma(const Problem& problem, const Config& config, const Device& device, Plan* plan) {
  const int operands = problem.is_gated ? 2 : 1;
  const int block_bytes = operands * plan->tile_rows * kBlockRowBytes;
  const int x_block_bytes = plan->keeps_x ? 0 : plan->columns * kBlockRowBytes;
  const std::int64_t dim_blocks = ceil_div(problem.dim, kBlockColumns);
  const std::int64_t share = ceil_div(dim_blocks, plan->splits);
  plan->blocks = 1;
  while (plan->blocks < kMaxBlocks && plan->blocks * (block_bytes + x_block_bytes) < kMinStageBytes &&
         plan->blocks * 2 <= share) {
    plan->blocks *= 2;
  }
  plan->iterations = ceil_div(dim_blocks, plan->blocks);
  plan->x_offset = plan->blocks * block_bytes;
  plan->stage_bytes = plan->x_offset + plan->blocks * x_block_bytes;
  const int kept_x = plan->keeps_x ? static_cast<int>(problem.rows * plan->iterations) * plan->blocks * kBlockRowBytes : 0;
  const int norm_weight =
      plan->keeps_x && problem.has_norm ? rounded_up(problem.dim * (problem.norm_weight_is_fp32 ? 4 : 2), kBlockRowBytes) : 0;
  const int overrun = overrun_rows(*plan) * kBlockRowBytes;
  const int inbox = inbox_bytes(problem, *plan);
  const int rest = kept_x + norm_weight + overrun + kBytesOfBarriers + inbox + kSharedAlignment;
  const int most = smaller(device.shared_bytes, larger(config.shared_bytes, rest + 2 * plan->stage_bytes));
  const std::int64_t own = ceil_div(plan->iterations, plan->splits);
  plan->stages = smaller(kMaxStages, (most - rest) / plan->stage_bytes);
  // Groups of columns take the stages in turn: each must find the same ones in every round of the ring, or it would take
  // the round before for its own.
  if (plan->column_groups == 2) plan->stages -= plan->stages % 2;
  if (plan->stages > own) plan->stages = static_cast<int>(own);
  // The sums of the tile take the ring's place in the end.
  const int sums = plan->column_groups * plan->columns * (operands * plan->tile_rows + 4) * 4;
  const int ring = larger(plan->stages * plan->stage_bytes, rounded_up(sums, kBlockRowBytes));
  plan->kept_x_offset = ring + overrun;
  plan->norm_weight_offset = plan->kept_x_offset + kept_x;
  plan->barrier_offset = plan->norm_weight_offset + norm_weight;
  plan->shared_bytes = plan->barrier_offset + kBytesOfBarriers + inbox + kSharedAlignment;
}

// Sums of a tile that groups of columns leave behind the barriers.
constexpr int row_sums_bytes(int operands, int groups, int tile_rows) {
  return groups > 1 ? groups * operands * tile_rows * 4 : 0;
}

// The kernel for one row: tiles as small as two CTAs an SM allow, and groups of columns so that a lane has few pieces.
// False where it cannot be.
constexpr bool place_row(const Problem& problem, const Config& config, const Device& device, Plan* plan) {
  const std::int64_t share = share_of_sm(problem, device), blocks = ceil_div(problem.dim, kBlockColumns);
  if (problem.rows != 1 || problem.features[0] == 0 || share > config.most_rows) return false;
  if (blocks > kMostBoxBlocks || problem.norm_weight_is_fp32) return false;
  int groups = 1;
  while (groups < kRowWarps && problem.dim > std::int64_t{groups} * kMaxRowPieces * 8 * 32) groups *= 2;
  if (problem.dim > std::int64_t{groups} * kMaxRowPieces * 8 * 32) return false;
  const int tile_rows = share <= 16 ? 8 : rounded_up(share, 8), operands = problem.is_gated ? 2 : 1;
  if (tile_rows * groups / kRowWarps > 32) return false;
  const std::int64_t bytes = blocks * operands * tile_rows * kBlockRowBytes;
  const int rest = kBytesOfBarriers + row_sums_bytes(operands, groups, tile_rows) + kSharedAlignment;
  if (bytes + rest > smaller(device.shared_bytes, config.shared_bytes)) return false;
  plan->by_row = plan->keeps_x = true;
  plan->warps = kRowWarps;
  plan->column_groups = groups;
  plan->row_pieces = static_cast<int>(ceil_div(problem.dim, std::int64_t{groups} * 8 * 32));
  plan->tile_rows = tile_rows;
  plan->blocks = static_cast<int>(blocks);
  plan->stages = 1;
  plan->iterations = 1;
  plan->stage_bytes = plan->barrier_offset = static_cast<int>(bytes);
  plan->shared_bytes = plan->barrier_offset + rest;
  return true;
}

// Measured on an H200 with the projections of an MLP of 4096 and of 896 columns, and in decoders' layers of these sizes.
constexpr int choose_config(const Problem& problem, const Device& device) {
  if (!device.has_wgmma) return kMmaConfig;
  Plan row{};
  if (place_row(problem, kConfigs[kRow], device, &row)) return kRow;
  constexpr std::int64_t kManyFeatures = 64, kSomeFeatures = 40, kFewFeatures = 16;
  const std::int64_t share = share_of_sm(problem, device);
  const bool keeps_rows = problem.rows <= kMaxKeptRows;
  if (share > kManyFeatures) return keeps_rows ? kOneLarge : kOne;
  if (problem.is_gated) return kOne;
  if (share <= kFewFeatures) return kFour;
  if (share > kSomeFeatures) return keeps_rows ? kOneLarge : kTwoLarge;
  return problem.rows <= 32 ? kTwo : kTwoLarge;
}

// Where weights are few, what counts is that the memory never waits for x. Measured on an H200 with 16 rows in decoders'
// layers of 896 columns: 30.9 us a layer instead of 32.0.
constexpr bool makes_way(const Problem& problem, const Plan& plan) {
  std::int64_t features = 0;
  for (int i = 0; i < problem.num_weights; ++i) features += problem.features[i];
  return plan.columns == 16 && features * problem.dim * 2 <= kFewBytes;
}

constexpr Plan plan_config(const Problem& problem, int number, const Config& chosen, const Device& device) {
  Plan plan{};
  plan.config = number;
  plan.is_wgmma = chosen.is_wgmma;
  plan.columns = padded_rows(problem.rows);
  plan.splits = chosen.splits;
  plan.makes_way = plan.is_wgmma && makes_way(problem, plan);
  if (!plan.is_wgmma) {
    plan.norms_first = problem.has_norm;
    plan.tile_rows = problem.is_gated ? kMmaTileRows / 2 : kMmaTileRows;
    plan.iterations = ceil_div(problem.dim, kMmaStageColumns);
    plan.stage_bytes = (kMmaTileRows + plan.columns) * kMmaStageColumns * 2;
    const int sums = 4 * plan.columns * (kMmaTileRows + 4) * 4;
    plan.shared_bytes = larger(kMmaStages * plan.stage_bytes, sums) + kSharedAlignment;
  } else if (!chosen.by_row || !place_row(problem, chosen, device, &plan)) {
    const std::int64_t dim_blocks = ceil_div(problem.dim, kBlockColumns);
    while (plan.splits > 1 && plan.splits > dim_blocks) plan.splits /= 2;
    plan.tile_rows = choose_tile_rows(problem, plan.splits, chosen.most_rows, device);
    const bool two = plan.tile_rows > kGroupRows, by_warps = plan.columns <= kMaxKeptRows;
    plan.column_groups = by_warps ? kRingWarps : two ? 1 : 2;
    plan.warps = by_warps ? kRingWarps : (two ? 2 : plan.column_groups) * 4;
    plan.keeps_x = chosen.keeps_x && problem.features[0] > 0 && problem.rows <= kMaxKeptRows &&
                   problem.rows * problem.dim * 2 <= kMaxKeptBytes;
    plan.norms_first = problem.has_norm && !plan.keeps_x;
    place_wgmma(problem, chosen, device, &plan);
  }
  const std::int64_t norm_bytes = problem.dim * (problem.norm_weight_is_fp32 ? 6 : 4);
  if (plan.norms_first && norm_bytes <= kMaxNormBytes) plan.norm_bytes = static_cast<int>(norm_bytes);
  number_tiles(problem, &plan);
  return plan;
}

// config: kHeuristic lets the plan choose.
constexpr Plan make_plan(const Problem& problem, int config, const Device& device) {
  const int number = config == kHeuristic || !device.has_wgmma ? choose_config(problem, device) : config;
  return plan_config(problem, number, kConfigs[number], device);
}

}  // namespace infuse::skinny_linear
