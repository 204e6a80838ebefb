// Tiles of the wgmma kernel and the shared memory they take. Plain C++ without CUDA.
#pragma once

namespace infuse::attention_forward {

constexpr int kWgmmaStages = 2;                 // tiles of K, and of V
constexpr int kWgmmaSharedBytes = 227 * 1024;   // that a CTA of sm_90 can have
constexpr int kWgmmaOtherBytes = 256;           // barriers and what the loading warp tells the others

// Keys of a tile, 0 where there is no kernel; warps are those that multiply, each 16 rows. What fits into the registers
// of a warpgroup: sums of 64 rows, scores, and the powers of the tile before.
constexpr int wgmma_keys(int dim, int warps, bool wide) {
  if (wide) return warps == 8 && dim == 128 ? 144 : 0;
  if (warps == 8) return dim == 96 || dim == 128 ? 128 : dim == 192 ? 112 : dim == 256 ? 80 : 0;
  return warps == 12 ? dim == 64 ? 128 : dim == 96 ? 96 : 0 : 0;
}

// Rows of 64 columns, 128 bytes, whatever is left of the last 64.
constexpr int wgmma_tile_bytes(int dim, int rows) { return (dim + 63) / 64 * rows * 128; }

// Tiles of queries: the next one comes early where there is room for it.
constexpr int wgmma_query_stages(int dim, int rows, int keys) {
  const int others = 2 * kWgmmaStages * wgmma_tile_bytes(dim, keys) + kWgmmaOtherBytes;
  return 2 * wgmma_tile_bytes(dim, rows) + others <= kWgmmaSharedBytes ? 2 : 1;
}

constexpr int wgmma_shared_bytes(int dim, int rows, int keys) {
  return wgmma_query_stages(dim, rows, keys) * wgmma_tile_bytes(dim, rows) +
         2 * kWgmmaStages * wgmma_tile_bytes(dim, keys) + kWgmmaOtherBytes;
}

}  // namespace infuse::attention_forward
