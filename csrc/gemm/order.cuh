// Which tile of the result a CTA computes when. Tiles go to clusters in turn; neighbours in time read the same rows of
// A and of B, so that these come from L2.
#pragma once

#include <cstdint>

#include "infuse/access.h"
#include "infuse/reduce.cuh"
#include "infuse/rows.h"

namespace infuse::gemm {

// Of the whole launch. A unit is what a cluster computes at a time: one tile for each CTA, side by side along the rows
// of the result or along its columns.
struct TileOrder {
  // Ends of the groups of rows, int32 [groups] on the device, ascending, or null: one group of all rows.
  const std::int32_t* ends = nullptr;
  std::uint32_t groups = 1, rows = 0;
  std::uint32_t tile_rows = 0, tile_columns = 0;         // of a CTA
  std::uint32_t cluster_rows = 1, cluster_columns = 1;   // tiles of a unit, 1 or 2; one of them is 1
  std::uint32_t row_units = 0, column_units = 0;
  std::uint32_t clusters = 0;  // of the launch
  // Without groups: sections of so many units along the rows, in each all columns, the rows innermost.
  std::uint32_t section = 1;
  FastDivisor section_units;               // units of a section
  FastDivisor full_section, last_section;  // along the rows: of all but the last, of the last
};

// How the tiles of a launch are dealt. section: units along the rows that take turns at all columns together.
struct Schedule {
  int cluster_rows, cluster_columns;  // 1 or 2, one of them 1
  int section;
};

// ends: of groups of rows, on the device, or null.
inline TileOrder order_tiles(const Schedule& schedule, std::uint32_t rows, std::uint32_t columns,
                             std::uint32_t tile_rows, std::uint32_t tile_columns, const std::int32_t* ends,
                             std::uint32_t groups) {
  TileOrder order;
  const auto units = [](std::uint32_t size, std::uint32_t tile, int cluster) {
    return static_cast<std::uint32_t>(ceil_div(size, std::int64_t{tile} * cluster));
  };
  order.ends = ends;
  order.groups = groups;
  order.rows = rows;
  order.tile_rows = tile_rows;
  order.tile_columns = tile_columns;
  order.cluster_rows = static_cast<std::uint32_t>(schedule.cluster_rows);
  order.cluster_columns = static_cast<std::uint32_t>(schedule.cluster_columns);
  order.row_units = units(rows, tile_rows, schedule.cluster_rows);
  order.column_units = units(columns, tile_columns, schedule.cluster_columns);
  order.section = static_cast<std::uint32_t>(schedule.section);
  if (order.section > order.row_units) order.section = order.row_units;
  const std::uint32_t left = order.row_units % order.section;
  order.section_units = FastDivisor(order.section * order.column_units);
  order.full_section = FastDivisor(order.section);
  order.last_section = FastDivisor(left > 0 ? left : order.section);
  return order;
}

// A tile of a CTA. `row` and `column` of the result, which may lie beyond its end.
struct Tile {
  std::uint32_t row, row_end, column, group;
};

// The tiles of one CTA, in turn. Every warp walks by itself, with all its lanes.
struct TileWalk {
  const TileOrder& order;
  std::uint32_t rank;         // of the CTA in its cluster
  std::uint32_t unit;         // the next one
  std::uint32_t group = 0, first_unit = 0, start = 0, end = 0;  // of the group, if there are groups

  // False if there are no more.
  __device__ __forceinline__ bool next(Tile& tile) {
    const bool found = order.ends == nullptr ? next_of_all(tile) : next_of_groups(tile);
    unit += order.clusters;
    return found;
  }

 private:
  __device__ __forceinline__ void place(Tile& tile, std::uint32_t row_unit, std::uint32_t column_unit) const {
    const std::uint32_t row_tile = row_unit * order.cluster_rows + (order.cluster_rows > 1 ? rank : 0);
    const std::uint32_t column_tile = column_unit * order.cluster_columns + (order.cluster_columns > 1 ? rank : 0);
    tile.row = start + row_tile * order.tile_rows;
    tile.column = column_tile * order.tile_columns;
  }

  __device__ __forceinline__ bool next_of_all(Tile& tile) const {
    if (unit >= order.row_units * order.column_units) return false;
    const std::uint32_t section = order.section_units.divide(unit);
    const std::uint32_t within = unit - section * order.section_units.divisor;
    const bool is_last = (section + 1) * order.section > order.row_units;
    const std::uint32_t column_unit =
        is_last ? order.last_section.divide(within) : order.full_section.divide(within);
    const std::uint32_t size = is_last ? order.last_section.divisor : order.full_section.divisor;
    tile.group = 0;
    tile.row_end = order.rows;
    place(tile, section * order.section + within - column_unit * size, column_unit);
    return true;
  }

  __device__ __forceinline__ std::uint32_t units_of_group() const {
    const std::uint32_t rows = order.tile_rows * order.cluster_rows;
    return (end - start + rows - 1) / rows * order.column_units;
  }

  __device__ __forceinline__ bool next_of_groups(Tile& tile) {
    std::uint32_t units = units_of_group();
    while (unit >= first_unit + units) {
      if (group == order.groups) return false;
      first_unit += units;
      start = end;
      // Shuffled, so that the compiler knows it to be the same in every lane: products must not lie in branches.
      const std::uint32_t given = static_cast<std::uint32_t>(__shfl_sync(kFullMask, max(order.ends[group++], 0), 0));
      end = min(max(given, start), order.rows);
      units = units_of_group();
    }
    const std::uint32_t row_units = units / order.column_units;
    const std::uint32_t column_unit = (unit - first_unit) / row_units;
    tile.group = group - 1;
    tile.row_end = end;
    place(tile, unit - first_unit - column_unit * row_units, column_unit);
    return true;
  }
};

}  // namespace infuse::gemm
