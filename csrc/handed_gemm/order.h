// Which tile of a result is computed when: plain C++ but for the marks, tested where there is no GPU.
#pragma once

#include <cstdint>

#include "infuse/access.h"
#include "infuse/rows.h"

namespace infuse::handed_gemm {

constexpr int kTileRows = 128, kTileColumns = 256;

// A tile's first row and column.
struct TilePlace {
  std::uint32_t row, column;
};

// Bands of tiles along the rows go through all columns together, so that both operands come from the L2.
struct TileOrder {
  std::uint32_t row_tiles, tiles;
  FastDivisor band_tiles, band_rows, last_band_rows;
};

// rows, columns: of the result, neither is 0. band: tiles along the rows, at most.
inline TileOrder order_tiles(std::int64_t rows, std::int64_t columns, int band) {
  TileOrder order;
  const auto column_tiles = static_cast<std::uint32_t>(ceil_div(columns, kTileColumns));
  order.row_tiles = static_cast<std::uint32_t>(ceil_div(rows, kTileRows));
  order.tiles = order.row_tiles * column_tiles;
  const auto most = static_cast<std::uint32_t>(band);
  const std::uint32_t band_rows = order.row_tiles < most ? order.row_tiles : most;
  const std::uint32_t left = order.row_tiles % band_rows;
  order.band_rows = FastDivisor(band_rows);
  order.last_band_rows = FastDivisor(left > 0 ? left : band_rows);
  order.band_tiles = FastDivisor(band_rows * column_tiles);
  return order;
}

INFUSE_HOST_DEVICE TilePlace place_of_tile(const TileOrder& order, std::uint32_t number) {
  const std::uint32_t band = order.band_tiles.divide(number), within = number - band * order.band_tiles.divisor;
  const std::uint32_t first = band * order.band_rows.divisor;
  const bool is_last = first + order.band_rows.divisor > order.row_tiles;
  const FastDivisor& band_rows = is_last ? order.last_band_rows : order.band_rows;
  const std::uint32_t column = band_rows.divide(within), row = first + within - column * band_rows.divisor;
  return {row * kTileRows, column * kTileColumns};
}

}  // namespace infuse::handed_gemm
