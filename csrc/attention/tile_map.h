// What a mask does to each tile of 64 queries by 64 keys, computed once for all heads and layers that share the mask.
#pragma once

#include <cstdint>

#include "attention/strides.h"
#include "infuse/tensor_arg.h"

namespace infuse::attention {

constexpr int kMapTile = 64;  // queries, and keys

// No row of the tile sees a key; the mask must be applied; the mask changes nothing.
enum TileState : std::uint8_t { kHidden = 0, kMasked = 1, kOpen = 2 };

// uint8 [batch or 1, heads or 1, ceil(queries / 64), ceil(keys / 64)], contiguous.
struct TileMapArg {
  const void* data;
  int device;
  int num_dims;
  const std::int64_t* sizes;
  const std::int64_t* strides;  // elements
};

// A checked map.
struct TileMapView {
  const std::uint8_t* data = nullptr;  // null: every tile is kMasked
  std::int64_t batch = 0, head = 0;    // elements between neighbours, 0 where broadcast
  std::uint32_t columns = 0;           // between neighbouring rows
};

// full: [batch, heads, queries, keys].
inline TileMapView view_tile_map(const char* op, const TileMapArg& map, const std::int64_t (&full)[4], int device) {
  check(map.device == device, op, "device of tile_map, got cuda:", map.device, ", expected cuda:", device, " (as q)");
  check(map.num_dims == 4, op, "dimensions of tile_map, got ", map.num_dims, ", expected 4");
  std::int64_t contiguous = 1;
  for (int i = 3; i >= 0; --i) {
    const std::int64_t expected = i < 2 ? full[i] : ceil_div(full[i], kMapTile);
    check(map.sizes[i] == expected || (i < 2 && map.sizes[i] == 1), op, "size of dimension ", i, " of tile_map, got ",
          map.sizes[i], ", expected ", expected);
    check(map.sizes[i] <= 1 || map.strides[i] == contiguous, op, "strides of tile_map, got ",
          shape_text(map.strides, 4), ", expected those of a contiguous tensor");
    contiguous *= map.sizes[i] > 1 ? map.sizes[i] : 1;
  }
  const std::int64_t of_head = map.sizes[2] * map.sizes[3];
  return {static_cast<const std::uint8_t*>(map.data), map.sizes[0] > 1 ? map.sizes[1] * of_head : 0,
          map.sizes[1] > 1 ? of_head : 0, static_cast<std::uint32_t>(map.sizes[3])};
}

}  // namespace infuse::attention
