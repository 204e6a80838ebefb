// Checks and launches of the tile map's kernels.
#include "attention/tile_map.cuh"

#include "attention/tile_map_launch.h"
#include "infuse/launch.h"
#include "infuse/vec.cuh"

namespace infuse::attention {
namespace {

constexpr std::int64_t kMaxGridYz = 65535;

constexpr int size_of_element(const MapArguments& a) { return a.dtype == DType::kNone ? 1 : size_bytes(a.dtype); }

// The mask as if it had four dimensions.
struct FullMask {
  std::int64_t sizes[4] = {1, 1, 1, 1}, strides[4] = {0, 0, 0, 0};
};

FullMask full_mask(const MapArguments& a) {
  FullMask full;
  for (int i = 0; i < a.num_dims; ++i) {
    const int dim = 4 - a.num_dims + i;
    full.sizes[dim] = a.sizes[i];
    full.strides[dim] = a.sizes[i] == 1 ? 0 : a.strides[i];
  }
  return full;
}

template <typename Element>
void run(const MapParams& params, int device, cudaStream_t stream) {
  const auto strips = static_cast<unsigned>(ceil_div(params.key_blocks, kMapTiles<Element>));
  const unsigned maps = params.maps < kMaxGridYz ? params.maps : static_cast<unsigned>(kMaxGridYz);
  launch_kernel(kMapOp, "tile_map_kernel", tile_map_kernel<Element>,
                {dim3(strips, params.row_blocks, maps), dim3(kMapThreads), 0, true}, params, device, stream);
  if constexpr (sizeof(Element) != 1) {
    const auto ctas = static_cast<unsigned>(ceil_div(std::int64_t{params.maps} * params.row_blocks, kMapWarps));
    launch_kernel(kMapOp, "finish_map_kernel", finish_map_kernel, {dim3(ctas), dim3(kMapThreads), 0, true}, params,
                  device, stream);
  }
}

}  // namespace

MapShape prepare_map(const MapArguments& a) {
  check(a.num_dims >= 1 && a.num_dims <= 4, kMapOp, "dimensions of mask, got ", a.num_dims, ", expected 1 to 4");
  check(a.queries >= 0 && a.keys >= 0, kMapOp, "queries and keys, got ", a.queries, " and ", a.keys,
        ", expected no negative numbers");
  const FullMask mask = full_mask(a);
  check(mask.sizes[2] == a.queries || mask.sizes[2] == 1, kMapOp, "rows of mask, got ", mask.sizes[2], ", expected ",
        a.queries, " or 1");
  check(mask.sizes[3] == a.keys, kMapOp, "last size of mask, got ", mask.sizes[3], ", expected ", a.keys);
  check(a.keys <= 1 || mask.strides[3] == 1, kMapOp, "stride of the last dimension of mask, got ", mask.strides[3],
        ", expected 1");
  const MapShape shape{mask.sizes[0], mask.sizes[1], ceil_div(a.queries, kMapTile), ceil_div(a.keys, kMapTile)};
  check(shape.row_blocks <= kMaxGridYz, kMapOp, "queries, got ", a.queries, ", expected at most ",
        kMaxGridYz * kMapTile);
  return shape;
}

void launch_map(const MapArguments& a, const MapShape& shape, void* map, void* workspace, cudaStream_t stream) {
  if (shape.batch * shape.heads * shape.row_blocks * shape.key_blocks == 0) return;
  const FullMask mask = full_mask(a);
  MapParams params{};
  params.mask = a.mask;
  params.map = static_cast<std::uint8_t*>(map);
  params.seen_rows = static_cast<std::uint64_t*>(workspace);
  params.stride = {mask.strides[0], mask.strides[1], mask.strides[2]};
  params.maps = static_cast<std::uint32_t>(shape.batch * shape.heads);
  params.heads = static_cast<std::uint32_t>(shape.heads);
  params.queries = static_cast<std::uint32_t>(a.queries);
  params.keys = static_cast<std::uint32_t>(a.keys);
  params.row_blocks = static_cast<std::uint32_t>(shape.row_blocks);
  params.key_blocks = static_cast<std::uint32_t>(shape.key_blocks);
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(a.mask);
  for (int i = 0; i < 3; ++i) bits |= static_cast<std::uint64_t>(mask.strides[i]) * size_of_element(a);
  params.is_aligned = bits % kVectorBytes == 0;
  switch (a.dtype) {
    case DType::kNone: return run<std::uint8_t>(params, a.device, stream);
    case DType::kBFloat16: return run<__nv_bfloat16>(params, a.device, stream);
    case DType::kFloat16: return run<__half>(params, a.device, stream);
    case DType::kFloat32: return run<float>(params, a.device, stream);
  }
}

}  // namespace infuse::attention
