// The order of the tiles of a GEMM: each tile of every group of rows goes to one CTA, once, and CTAs of a cluster get
// neighbours. And the plan of gated linears. The kernels themselves are tested on a GPU.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <tuple>
#include <vector>

#include "cuda_on_cpu.h"

using std::max;
using std::min;

// One thread stands for its warp.
inline int __shfl_sync(unsigned, int value, int) { return value; }

#include "gated_linear/plan.h"
#include "gemm/order.cuh"

using namespace infuse::gemm;

namespace {

constexpr std::uint32_t kRows = 128, kColumns = 112;
using Place = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>;  // group, row, column

void require(bool holds, const char* what) {
  if (!holds) emulation::die(what);
}

// Tiles that a CTA is given, one list for each CTA of a launch of so many clusters.
std::vector<std::vector<Tile>> deal(TileOrder order, std::uint32_t clusters) {
  order.clusters = clusters;
  std::vector<std::vector<Tile>> dealt;
  for (std::uint32_t cluster = 0; cluster < clusters; ++cluster) {
    for (std::uint32_t rank = 0; rank < order.cluster_rows * order.cluster_columns; ++rank) {
      TileWalk walk{order, rank, cluster};
      dealt.emplace_back();
      for (Tile tile; walk.next(tile);) dealt.back().push_back(tile);
    }
  }
  return dealt;
}

void check(const Schedule& schedule, const std::vector<std::int32_t>& ends, std::uint32_t rows, std::uint32_t columns) {
  const bool grouped = !ends.empty();
  const TileOrder order = order_tiles(schedule, rows, columns, kRows, kColumns, grouped ? ends.data() : nullptr,
                                      static_cast<std::uint32_t>(ends.size()));
  std::set<Place> expected;
  std::uint32_t start = 0;
  for (std::size_t group = 0; group < (grouped ? ends.size() : 1); ++group) {
    const std::uint32_t end = grouped ? static_cast<std::uint32_t>(ends[group]) : rows;
    for (std::uint32_t row = start; row < end; row += kRows) {
      for (std::uint32_t column = 0; column < columns; column += kColumns) expected.insert({group, row, column});
    }
    start = end;
  }
  const std::uint32_t cluster = order.cluster_rows * order.cluster_columns;
  for (const std::uint32_t clusters : {1u, 7u, 66u}) {
    std::set<Place> seen;
    const auto dealt = deal(order, clusters);
    for (std::size_t cta = 0; cta < dealt.size(); ++cta) {
      require(dealt[cta].size() == dealt[cta - cta % cluster].size(), "CTAs of a cluster with more tiles than others");
      for (std::size_t i = 0; i < dealt[cta].size(); ++i) {
        const Tile& tile = dealt[cta][i];
        const Tile& first = dealt[cta - cta % cluster][i];
        require(tile.group == first.group && tile.row_end == first.row_end, "groups differ in a cluster");
        require(order.cluster_rows > 1 || tile.row == first.row, "rows differ in a cluster");
        require(order.cluster_columns > 1 || tile.column == first.column, "columns differ in a cluster");
        require(grouped ? tile.row_end == static_cast<std::uint32_t>(ends[tile.group]) : tile.row_end == rows,
                "the end of the rows");
        if (tile.row >= tile.row_end || tile.column >= columns) continue;  // beside the last tiles of a cluster
        require(seen.insert({tile.group, tile.row, tile.column}).second, "a tile twice");
      }
    }
    require(seen == expected, "not the tiles of the result");
  }
}

// What is chosen can run, on Hopper by wgmma; where it was measured, it is what was fastest there.
void check_plan() {
  using namespace infuse::gated_linear;
  constexpr Device kH200{132, 232448, true}, kOther{108, 166912, false};
  for (const std::int64_t rows : {1, 128, 300, 4096, 1 << 20}) {
    for (int flags = 0; flags < 4; ++flags) {
      const std::int64_t groups = (flags & 1) != 0 ? 64 : 1;
      const Problem problem{rows, 1408, 2048, groups, groups > 1, (flags & 2) != 0};
      const Config& config = kConfigs[choose(problem, kH200)];
      require(!config.is_mma && obstacle(problem, config, kH200) == nullptr, "a plan that cannot run");
      require(kConfigs[choose(problem, kOther)].is_mma, "a plan for another device");
    }
  }
  const auto chosen = [&](std::int64_t rows, std::int64_t groups) {
    const Config& config = kConfigs[choose({rows, 14336, 4096, groups, groups > 1, false}, kH200)];
    return std::tuple(config.columns, config.cluster_rows);
  };
  require(chosen(128, 1) == std::tuple(112, 1) && chosen(512, 1) == std::tuple(112, 2), "few rows");
  require(chosen(8192, 1) == std::tuple(128, 2), "many rows");
  require(chosen(16384, 8) == std::tuple(128, 1), "groups");
}

}  // namespace

int main() {
  check_plan();
  for (const Schedule& schedule : {Schedule{1, 1, 1}, Schedule{2, 1, 3}, Schedule{1, 2, 16}}) {
    for (const std::uint32_t rows : {1u, 128u, 129u, 1000u, 4096u}) {
      for (const std::uint32_t columns : {8u, 112u, 120u, 1792u}) check(schedule, {}, rows, columns);
    }
    for (const std::uint32_t columns : {8u, 1000u}) {
      check(schedule, {300}, 300, columns);
      check(schedule, {0, 0, 5, 133, 133, 700, 700}, 900, columns);
      check(schedule, {0, 0}, 900, columns);
      check(schedule, std::vector<std::int32_t>(128, 900), 900, columns);
    }
  }
  std::printf("ok\n");
}
