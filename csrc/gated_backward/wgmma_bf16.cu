#include "gated_backward/launch_wgmma.cuh"

namespace infuse::gated_backward {

template void launch_wgmma<DType::kBFloat16>(const GemmProblem&, cudaStream_t);

bool has_wgmma(int device) {
  using T = Element<DType::kBFloat16>;
  return handed_gemm::is_compiled<T, handed_gemm::Pair::kInSequence, GatedFinisher>(kGemmOp, device);
}

}  // namespace infuse::gated_backward
