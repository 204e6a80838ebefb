// What the wgmma kernel is given beyond what all kernels of the family are.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention_forward/params.h"

namespace infuse::attention_forward {

// The order of the tiles [rows of a CTA, all keys] of a launch: by sections of heads whose K and V stay in L2 together,
// in a section the last rows of every head first, which see most keys if attention is causal.
struct TileOrder {
  std::uint32_t tiles, total_heads;  // of all batches
  std::uint32_t section_heads;
  FastDivisor section_tiles;
  FastDivisor full_section, last_section;  // heads of a section: of all but the last, and of the last
  std::uint32_t row_blocks;
};

struct WgmmaParams {
  CUtensorMap q, k, v;
  Params base;
  TileOrder order;
  std::uint32_t* counter;    // of tiles beyond each CTA's first that were taken, 0 before the launch; null without any
  bool scores_need_scaling;  // before the softmax: a cap, or a scale that is not above 0
};

}  // namespace infuse::attention_forward
