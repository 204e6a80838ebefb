// The plan of linears of few rows, for many sizes on three devices: it fits, covers all features and columns, and puts
// things where the copy engine and the products take them. The kernels themselves are tested on a GPU.
#include "skinny_linear/plan.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace infuse::skinny_linear;

namespace {

// Streaming multiprocessors, shared memory that a CTA can have, wgmma: H200, A100, A10.
constexpr Device kDevices[] = {{132, 231424, true}, {108, 165824, false}, {72, 100352, false}};

void require(bool holds, const char* what, const Problem& p, const Plan& plan) {
  if (holds) return;
  std::printf("%s: rows %lld, dim %lld, features %lld, gated %d, norm %d: configuration %d, tile %d, %d bytes\n", what,
              static_cast<long long>(p.rows), static_cast<long long>(p.dim), static_cast<long long>(p.features[0]),
              p.is_gated, p.has_norm, plan.config, plan.tile_rows, plan.shared_bytes);
  std::exit(1);
}

void check_wgmma(const Problem& problem, const Plan& plan) {
  const int operands = problem.is_gated ? 2 : 1;
  require(plan.tile_rows % 8 == 0 && plan.tile_rows <= kMaxGroups * kGroupRows, "rows of a tile", problem, plan);
  require(plan.warps % 4 == 0 && plan.warps <= kRingWarps, "warps", problem, plan);
  require(plan.stages >= 1 && plan.stages <= kMaxStages, "stages", problem, plan);
  const bool once = plan.stages >= (plan.iterations + plan.splits - 1) / plan.splits;
  require(plan.column_groups != 2 || once || plan.stages % 2 == 0, "stages that groups share", problem, plan);
  require(plan.splits >= 1 && plan.splits <= 8, "splits", problem, plan);
  require(plan.iterations * plan.blocks * kBlockColumns >= problem.dim, "columns", problem, plan);
  const int x_bytes = plan.keeps_x ? 0 : plan.columns * kBlockRowBytes;
  require(plan.stage_bytes == plan.blocks * (operands * plan.tile_rows * kBlockRowBytes + x_bytes), "bytes of a stage",
          problem, plan);
  require(plan.stage_bytes % kSharedAlignment == 0 && plan.x_offset % kSharedAlignment == 0, "alignment of a stage",
          problem, plan);
  const int ring = plan.stages * plan.stage_bytes, overrun = overrun_rows(plan) * kBlockRowBytes;
  require(plan.kept_x_offset >= ring + overrun && plan.kept_x_offset % 16 == 0, "place of x", problem, plan);
  require(plan.column_groups * plan.columns * (operands * plan.tile_rows + 4) * 4 <= plan.kept_x_offset, "place of sums", problem, plan);
  const std::int64_t kept = plan.keeps_x ? problem.rows * plan.iterations * plan.blocks * kBlockColumns * 2 : 0;
  require(plan.norm_weight_offset >= plan.kept_x_offset + kept && plan.norm_weight_offset % 16 == 0, "norm's weight",
          problem, plan);
  const std::int64_t weight = plan.keeps_x && problem.has_norm ? problem.dim * (problem.norm_weight_is_fp32 ? 4 : 2) : 0;
  require(plan.barrier_offset >= plan.norm_weight_offset + weight && plan.barrier_offset % 8 == 0, "barriers", problem,
          plan);
  require(plan.barrier_offset + kBytesOfBarriers + kSharedAlignment <= plan.shared_bytes, "end", problem, plan);
}

void check(const Problem& problem, int config, const Device& device) {
  const Plan plan = make_plan(problem, config, device);
  require(plan.shared_bytes <= device.shared_bytes, "too much shared memory", problem, plan);
  require(plan.columns >= problem.rows && plan.columns <= kMaxRows, "rows", problem, plan);
  require(plan.is_wgmma <= device.has_wgmma, "what the device lacks", problem, plan);
  require(plan.norms_first == (problem.has_norm && !plan.keeps_x), "norm", problem, plan);
  std::int64_t tiles = 0;
  for (int i = 0; i < num_outputs(problem); ++i) {
    require(plan.first_tile[i] == tiles, "first tile", problem, plan);
    while ((tiles - plan.first_tile[i]) * plan.tile_rows < problem.features[i]) ++tiles;
  }
  require(plan.tiles == tiles, "tiles", problem, plan);
  if (plan.is_wgmma) check_wgmma(problem, plan);
}

}  // namespace

int main() {
  for (const Device& device : kDevices) {
    for (const std::int64_t rows : {1, 2, 3, 8, 9, 16, 17, 32, 64}) {
      for (const std::int64_t dim : {8, 64, 72, 896, 4096, 4864, 14336, 1 << 20}) {
        for (const std::int64_t features : {0, 1, 77, 896, 4864, 14336, 128256}) {
          for (int kind = 0; kind < 8; ++kind) {
            const bool gated = kind & 1, norm = kind & 2, more = kind & 4;
            Problem problem{rows, dim, gated ? 2 : more ? 3 : 1, {features, features, features / 4}, gated, norm, more};
            for (int config = kHeuristic; config < kNumConfigs; ++config) check(problem, config, device);
          }
        }
      }
    }
  }
  std::printf("ok\n");
}
