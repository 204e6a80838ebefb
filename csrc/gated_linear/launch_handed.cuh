// From a configuration to a launch of the kernel that hands its tiles over. Included by the files that instantiate
// launch_handed.
#pragma once

#include "gated_linear/handed_finish.cuh"
#include "gated_linear/launch.h"
#include "handed_gemm/launch.cuh"

namespace infuse::gated_linear {

template <DType kDType>
void launch_handed(const Config& config, const Params& base, int device, cudaStream_t stream) {
  using T = Element<kDType>;
  handed_gemm::Params<HandedFinisher::Params> params{};
  const auto map = [&](const void* data, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                       int box_rows = handed_gemm::kTileRows) {
    return handed_gemm::map_matrix(kOp, kDType, data, rows, columns, stride, box_rows);
  };
  params.a[0] = map(base.x, base.rows, base.dim, base.x_stride);
  params.b[0] = map(base.gate_weight, base.columns, base.dim, base.gate_stride, handed_gemm::kTileColumns / 2);
  params.b[1] = map(base.up_weight, base.columns, base.dim, base.up_stride, handed_gemm::kTileColumns / 2);
  params.steps[0] = static_cast<std::uint32_t>(ceil_div(base.dim, handed_gemm::kDepth));
  const std::int64_t column_tiles = ceil_div(base.columns, handed_gemm::kTileColumns / 2);
  params.order = handed_gemm::order_tiles(base.rows, column_tiles * handed_gemm::kTileColumns, config.section);
  HandedFinisher::Params& finisher = params.finisher;
  finisher.keeps = base.gate_up != nullptr;
  if (finisher.keeps) {
    finisher.gate = map(base.gate_up, base.rows, base.columns, 2 * std::int64_t{base.columns});
    finisher.up = map(static_cast<T*>(base.gate_up) + base.columns, base.rows, base.columns,
                      2 * std::int64_t{base.columns});
  }
  finisher.out = base.out;
  finisher.out_stride = base.out_stride;
  finisher.rows = base.rows;
  finisher.columns = base.columns;
  finisher.activation = base.activation;
  handed_gemm::launch<T, handed_gemm::Pair::kSideBySide, HandedFinisher>(kOp, config.name, params, device, stream);
}

}  // namespace infuse::gated_linear
