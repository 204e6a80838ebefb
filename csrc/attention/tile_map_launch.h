// Host interface of the tile map's kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "infuse/dtype.h"

namespace infuse::attention {

constexpr char kMapOp[] = "attention_tile_map";

struct MapArguments {
  const void* mask;
  DType dtype;  // kNone: bool
  int device;
  int num_dims;
  const std::int64_t* sizes;
  const std::int64_t* strides;  // elements
  std::int64_t queries, keys;
};

struct MapShape {
  std::int64_t batch, heads, row_blocks, key_blocks;
};

// Checks the arguments. Throws std::runtime_error for what the kernels can't take.
MapShape prepare_map(const MapArguments& arguments);

// map: uint8 of that shape; workspace: 8 bytes for each of its elements, null for a bool mask.
void launch_map(const MapArguments& arguments, const MapShape& shape, void* map, void* workspace, cudaStream_t stream);

}  // namespace infuse::attention
