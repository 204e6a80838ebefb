// From a configuration to a launch of the GEMM kernel. Included by the files that instantiate launch_wgmma.
#pragma once

#include "dispatch.h"
#include "gated_linear/launch.h"
#include "gated_linear/wgmma_epilogue.cuh"
#include "gemm/launch.cuh"

namespace infuse::gated_linear {

template <typename T, int kColumns, bool kByColumns>
using Traits = gemm::GemmTraits<T, 2 * kColumns, kByColumns, gemm::Operands::kSideBySide,
                                gemm::kTileRows * kColumns * static_cast<int>(sizeof(T))>;

template <typename T, int kColumns>
EpilogueParams make_epilogue(DType dtype, const Params& base) {
  const auto map = [&](void* data, std::int64_t stride) {
    constexpr bool kSwizzled = Epilogue<T, kColumns>::kSwizzled;
    return make_tensor_map(kOp, {data, dtype, 1, 1, base.rows, base.columns, 0, 0, stride}, gemm::kGroupRows,
                           kSwizzled ? kSwizzledColumns : kColumns, kSwizzled);
  };
  EpilogueParams params{};
  params.base = base;
  params.out = map(base.out, base.out_stride);
  if (base.gate_up != nullptr) {
    const std::int64_t columns = base.columns;
    params.gate = map(base.gate_up, 2 * columns);
    params.up = map(static_cast<T*>(base.gate_up) + columns, 2 * columns);
  }
  return params;
}

template <DType kDType, int kColumns, bool kByColumns>
void launch_tiles(const Config& config, const Params& base, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  using Shape = Traits<T, kColumns, kByColumns>;
  gemm::KernelParams<Epilogue<T, kColumns>> params{};
  params.gemm.a[0] = gemm::map_a(kOp, kDType, base.x, base.rows, base.dim, base.x_stride);
  params.gemm.b[0] = gemm::map_b<Shape>(kOp, kDType, base.gate_weight, base.groups, base.columns, base.dim,
                                        base.gate_group_stride, base.gate_stride);
  params.gemm.b[1] = gemm::map_b<Shape>(kOp, kDType, base.up_weight, base.groups, base.columns, base.dim,
                                        base.up_group_stride, base.up_stride);
  params.gemm.order =
      gemm::order_tiles({config.cluster_rows, config.cluster_columns, config.section}, base.rows,
                        base.columns, gemm::kTileRows, kColumns, base.ends, base.groups);
  gemm::set_chunks<Shape>(&params.gemm, base.dim);
  params.gemm.keep_a = L2::kEvictLast;  // while a section's columns pass by
  params.gemm.keep_b = L2::kNormal;
  params.epilogue = make_epilogue<T, kColumns>(kDType, base);
  gemm::launch_gemm<Shape>(kOp, config.name, params, device, stream);
}

template <DType kDType>
void launch_wgmma(const Config& config, const Params& params, int device, cudaStream_t stream) {
  if (params.by_columns) return launch_tiles<kDType, 128, true>(config, params, device, stream);
  dispatch_int<112, 128>(kOp, "columns of a tile", config.columns, [&](auto columns) {
    launch_tiles<kDType, decltype(columns)::value, false>(config, params, device, stream);
  });
}

}  // namespace infuse::gated_linear
