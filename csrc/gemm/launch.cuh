// The host's side of the GEMM kernel: maps of the operands, order of the tiles, the launch.
#pragma once

#include "gemm/kernel.cuh"
#include "infuse/launch.h"
#include "infuse/tensor_map.h"

namespace infuse::gemm {

// A [rows, K] as the kernel reads it.
inline CUtensorMap map_a(const char* op, DType dtype, const void* data, std::int64_t rows, std::int64_t k,
                         std::int64_t row_stride) {
  return make_tensor_map(op, {data, dtype, 1, 1, rows, k, 0, 0, row_stride}, kGroupRows, kChunk);
}

// B [groups, columns, K], or if kByColumns [groups, K, columns]; `stride` is that of the last dimension but one.
template <typename Traits>
CUtensorMap map_b(const char* op, DType dtype, const void* data, std::int64_t groups, std::int64_t columns,
                  std::int64_t k, std::int64_t group_stride, std::int64_t stride) {
  if (Traits::kByColumns) {
    return make_tensor_map(op, {data, dtype, 1, groups, k, columns, 0, group_stride, stride}, kChunk, kSwizzledColumns);
  }
  return make_tensor_map(op, {data, dtype, 1, groups, columns, k, 0, group_stride, stride}, Traits::kN / 2, kChunk);
}

// k: of each matrix.
template <typename Traits>
void set_chunks(GemmParams* params, std::int64_t k) {
  params->chunks = static_cast<std::uint32_t>(ceil_div(k, kChunk));
  params->chunks_of_tile = params->chunks * (Traits::kOperands == Operands::kInSequence ? 2 : 1);
}

// Fewer CTAs than the device holds if there are fewer tiles; how many groups of rows need is not known here.
template <typename Traits, typename Epilogue>
void launch_gemm(const char* op, const char* name, KernelParams<Epilogue> params, int device, cudaStream_t stream) {
  const auto kernel = gemm_kernel<Traits, Epilogue>;
  TileOrder& order = params.gemm.order;
  Launch launch{dim3(1), dim3(kThreads), Traits::kSharedBytes, true};
  launch.cluster = static_cast<int>(order.cluster_rows * order.cluster_columns);
  const unsigned most = resident_clusters(op, kernel, launch, device);
  const std::uint64_t units = std::uint64_t{order.row_units} * order.column_units;
  order.clusters = order.ends == nullptr && units < most ? static_cast<std::uint32_t>(units) : most;
  launch.grid = dim3(order.clusters * static_cast<unsigned>(launch.cluster));
  launch_kernel(op, name, kernel, launch, params, device, stream);
}

}  // namespace infuse::gemm
