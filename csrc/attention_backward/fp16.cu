#include "attention_backward/launch_mma.cuh"

namespace infuse::attention_backward {

template void launch_mma<DType::kFloat16>(const Plan&, const Params&, int, cudaStream_t);

}  // namespace infuse::attention_backward
