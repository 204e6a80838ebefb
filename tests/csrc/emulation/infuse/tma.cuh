// Stands in for csrc/include/infuse/tma.cuh on the CPU: boxes [heads, rows, 64 columns] of two-byte elements, whose
// pieces of 16 bytes change places by the row's number.
#pragma once

#include <cuda.h>

#include "cuda_on_cpu.h"
#include "infuse/async_copy.cuh"
#include "infuse/mbarrier.cuh"

namespace infuse {

enum class L2 { kNormal, kEvictFirst, kEvictLast };

// What a map describes, in its first bytes: columns of a head, and of the box heads and rows.
struct EmulatedMap {
  const char* data;
  std::int64_t heads, rows, columns, head_stride, row_stride;  // strides in elements
  std::int32_t box_heads, box_rows;
};

inline CUtensorMap as_tensor_map(const EmulatedMap& map) {
  CUtensorMap made{};
  std::memcpy(&made, &map, sizeof(map));
  return made;
}

inline void prefetch_map(const CUtensorMap&) {}

inline void load_box(SharedAddress shared, const CUtensorMap& given, SharedAddress barrier, L2, std::int32_t column,
                     std::int32_t row, std::int32_t head, std::int32_t) {
  EmulatedMap map;
  std::memcpy(static_cast<void*>(&map), &given, sizeof(map));
  for (std::int32_t h = 0; h < map.box_heads; ++h) {
    for (std::int32_t r = 0; r < map.box_rows; ++r) {
      for (std::int32_t c = 0; c < 64; ++c) {
        char* place = shared_bytes_at(shared + (h * map.box_rows + r) * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, 2);
        std::memset(place, 0, 2);
        if (head + h >= map.heads || row + r >= map.rows || column + c >= map.columns) continue;
        const std::int64_t element = (head + h) * map.head_stride + (row + r) * map.row_stride + column + c;
        std::memcpy(place, map.data + element * 2, 2);
      }
    }
  }
  barrier_at(barrier).bytes -= map.box_heads * map.box_rows * 128;
}

}  // namespace infuse
