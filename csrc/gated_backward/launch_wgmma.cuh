// From a problem to a launch of its GEMM. Included by the files that instantiate launch_wgmma.
#pragma once

#include "gated_backward/finishers.cuh"
#include "gated_backward/gemms.h"
#include "handed_gemm/launch.cuh"

namespace infuse::gated_backward {

constexpr char kGemmOp[] = "gated_backward";

template <typename Finisher>
handed_gemm::Params<typename Finisher::Params> make_params(const GemmProblem& p) {
  handed_gemm::Params<typename Finisher::Params> params{};
  for (int i = 0; i < p.pairs; ++i) {
    const void* a = static_cast<const char*>(p.a) + i * p.depth * size_bytes(p.dtype);
    params.a[i] = handed_gemm::map_matrix(kGemmOp, p.dtype, a, p.rows, p.depth, p.a_stride, kTileRows);
    params.b[i] = handed_gemm::map_matrix(kGemmOp, p.dtype, p.b[i], p.depth, p.columns, p.b_stride[i],
                                          handed_gemm::kDepth);
    params.steps[i] = static_cast<std::uint32_t>(ceil_div(p.depth, handed_gemm::kDepth));
  }
  params.order = handed_gemm::order_tiles(p.rows, p.columns, p.config.band);
  return params;
}

template <DType kDType>
void launch_wgmma(const GemmProblem& p, cudaStream_t stream) {
  using T = Element<kDType>;
  if (p.dx != nullptr) {
    auto params = make_params<PlainFinisher>(p);
    params.finisher.c = handed_gemm::map_matrix(kGemmOp, kDType, p.dx, p.rows, p.columns, p.columns, kTileRows);
    handed_gemm::launch<T, PlainFinisher>(kGemmOp, p.config.name, params, p.device, stream);
  } else {
    auto params = make_params<GatedFinisher>(p);
    params.finisher = {p.gate_up, p.dgate_up, p.out, p.gate_up_stride, static_cast<std::uint32_t>(p.rows),
                       static_cast<std::uint32_t>(p.columns), p.activation};
    handed_gemm::launch<T, GatedFinisher>(kGemmOp, p.config.name, params, p.device, stream);
  }
}

}  // namespace infuse::gated_backward
