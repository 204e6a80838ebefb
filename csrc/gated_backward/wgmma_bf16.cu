#include "gated_backward/launch_wgmma.cuh"

namespace infuse::gated_backward {

template void launch_wgmma<DType::kBFloat16>(const GemmProblem&, cudaStream_t);

bool has_wgmma(int device) {
  return handed_gemm::is_compiled<Element<DType::kBFloat16>, GatedFinisher>(kGemmOp, device);
}

}  // namespace infuse::gated_backward
