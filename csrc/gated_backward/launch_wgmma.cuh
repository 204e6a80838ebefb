// From a problem to a launch of its GEMM. Included by the files that instantiate launch_wgmma.
#pragma once

#include "gated_backward/gemms.h"
#include "gated_backward/wgmma_kernel.cuh"
#include "infuse/launch.h"
#include "infuse/tensor_map.h"

namespace infuse::gated_backward {

constexpr char kGemmOp[] = "gated_backward";

inline WgmmaParams make_params(const GemmProblem& p) {
  WgmmaParams params{};
  const auto map = [&](const void* data, std::int64_t rows, std::int64_t columns, std::int64_t stride, int box_rows) {
    return make_tensor_map(kGemmOp, {data, p.dtype, 1, 1, rows, columns, 0, 0, stride}, box_rows, kSwizzledColumns);
  };
  for (int i = 0; i < p.pairs; ++i) {
    const void* a = static_cast<const char*>(p.a) + i * p.depth * size_bytes(p.dtype);
    params.a[i] = map(a, p.rows, p.depth, p.a_stride, kTileRows);
    params.b[i] = map(p.b[i], p.depth, p.columns, p.b_stride[i], kDepth);
    params.steps[i] = static_cast<std::uint32_t>(ceil_div(p.depth, kDepth));
  }
  if (p.dx != nullptr) params.c = map(p.dx, p.rows, p.columns, p.columns, kTileRows);
  params.gated = {p.gate_up, p.dgate_up, p.out, p.gate_up_stride, p.activation};
  params.rows = static_cast<std::uint32_t>(p.rows);
  params.columns = static_cast<std::uint32_t>(p.columns);
  return params;
}

inline void order_tiles(const GemmConfig& config, WgmmaParams* params) {
  const auto column_tiles = static_cast<std::uint32_t>(ceil_div(params->columns, kTileColumns));
  params->row_tiles = static_cast<std::uint32_t>(ceil_div(params->rows, kTileRows));
  params->tiles = params->row_tiles * column_tiles;
  const auto most = static_cast<std::uint32_t>(config.band);
  const std::uint32_t band = params->row_tiles < most ? params->row_tiles : most, left = params->row_tiles % band;
  params->band_rows = FastDivisor(band);
  params->last_band_rows = FastDivisor(left > 0 ? left : band);
  params->band_tiles = FastDivisor(band * column_tiles);
}

template <typename T, bool kGated>
void launch_tiles(const GemmProblem& problem, cudaStream_t stream) {
  WgmmaParams params = make_params(problem);
  order_tiles(problem.config, &params);
  const auto kernel = wgmma_kernel<T, kGated>;
  const unsigned most = resident_ctas(kGemmOp, kernel, kWgmmaThreads, kSharedBytes, problem.device);
  const Launch launch{dim3(params.tiles < most ? params.tiles : most), dim3(kWgmmaThreads), kSharedBytes, true};
  launch_kernel(kGemmOp, problem.config.name, kernel, launch, params, problem.device, stream);
}

template <DType kDType>
void launch_wgmma(const GemmProblem& problem, cudaStream_t stream) {
  using T = Element<kDType>;
  if (problem.dx != nullptr) {
    launch_tiles<T, false>(problem, stream);
  } else {
    launch_tiles<T, true>(problem, stream);
  }
}

}  // namespace infuse::gated_backward
