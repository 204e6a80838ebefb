#include "gated_backward/launch_wgmma.cuh"

namespace infuse::gated_backward {

template void launch_wgmma<DType::kFloat16>(const GemmProblem&, cudaStream_t);

}  // namespace infuse::gated_backward
