#include "gated_backward/launch_planned.cuh"

namespace infuse::gated_backward {

template void launch_planned<DType::kBFloat16>(const Plan&, const Params&, int, cudaStream_t);

}  // namespace infuse::gated_backward
