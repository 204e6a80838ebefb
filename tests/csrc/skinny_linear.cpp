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

void check_row(const Problem& problem, const Plan& plan) {
  const int operands = problem.is_gated ? 2 : 1, groups = plan.column_groups;
  require(problem.rows == 1 && !problem.norm_weight_is_fp32 && plan.splits == 1, "one row", problem, plan);
  require(groups >= 1 && groups <= kRowWarps && kRowWarps % groups == 0, "groups of columns", problem, plan);
  require(plan.row_pieces >= 1 && plan.row_pieces <= kMaxRowPieces, "pieces of a lane", problem, plan);
  require(std::int64_t{plan.row_pieces} * groups * 32 * 8 >= problem.dim, "columns of the lanes", problem, plan);
  const int features = plan.tile_rows * groups / kRowWarps;
  require(features <= 32 && features * kRowWarps == plan.tile_rows * groups, "features of a warp", problem, plan);
  require(plan.tile_rows % 8 == 0 && plan.tile_rows <= kRowWarps * 32, "rows of a tile", problem, plan);
  require(plan.stages == 1 && plan.iterations == 1 && plan.blocks <= kMostBoxBlocks, "stage", problem, plan);
  require(plan.blocks * kBlockColumns >= problem.dim, "columns", problem, plan);
  require(plan.stage_bytes == plan.blocks * operands * plan.tile_rows * kBlockRowBytes, "bytes", problem, plan);
  require(plan.barrier_offset >= plan.stage_bytes && plan.barrier_offset % 8 == 0, "barrier", problem, plan);
  const int sums = groups > 1 ? groups * operands * plan.tile_rows * 4 : 0;
  require(plan.barrier_offset + kBytesOfBarriers + sums + kSharedAlignment <= plan.shared_bytes, "end", problem, plan);
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
  const std::int64_t inbox = plan.splits > 1 ? problem.rows * plan.tile_rows * operands * 4 : 0;
  require(plan.barrier_offset + kBytesOfBarriers + inbox + kSharedAlignment <= plan.shared_bytes, "end", problem, plan);
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
  if (plan.is_wgmma) plan.by_row ? check_row(problem, plan) : check_wgmma(problem, plan);
}

// One token of a small decoder, Qwen2.5 0.5B's: all its linears fit, and any two that follow each other side by side.
void check_small_decoder() {
  const Device& h200 = kDevices[0];
  const Problem qkv{1, 896, 3, {896, 128, 128}, false, true, false}, out{1, 896, 1, {896}, false, false, false};
  const Problem gate_up{1, 896, 2, {4864, 4864}, true, true, false}, down{1, 4864, 1, {896}, false, false, false};
  constexpr int kBytesOfSm = 228 * 1024, kReserved = 1024 + 32 + 128;
  int before = 0;
  for (const Problem& problem : {qkv, out, gate_up, down, qkv}) {
    const Plan plan = make_plan(problem, kHeuristic, h200);
    require(plan.by_row && plan.tiles <= 2 * h200.num_sms, "the kernel for one row", problem, plan);
    require(before + plan.shared_bytes + 2 * kReserved <= kBytesOfSm, "room beside the one before", problem, plan);
    before = plan.shared_bytes;
  }
}

// The next kernel may start before a ring's last copies only where that was measured: 9 to 16 rows and few weights.
void check_way_for_next() {
  for (const std::int64_t rows : {1, 8, 9, 16, 17, 64}) {
    const bool measured = rows > 8 && rows <= 16;
    const Problem small{rows, 896, 2, {4864, 4864}, true, true, false}, large{rows, 4096, 1, {4096}, false, false, false};
    const Plan few = make_plan(small, kHeuristic, kDevices[0]), many = make_plan(large, kHeuristic, kDevices[0]);
    require(few.makes_way == measured, "few weights", small, few);
    require(!many.makes_way, "many weights", large, many);
    require(!make_plan(small, kHeuristic, kDevices[1]).makes_way, "without wgmma", small, few);
  }
}

}  // namespace

int main() {
  check_small_decoder();
  check_way_for_next();
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
