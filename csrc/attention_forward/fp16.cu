#include "attention_forward/launch_mma.cuh"

namespace infuse::attention_forward {

template void launch_mma<DType::kFloat16>(const Plan&, const Params&, int, cudaStream_t);

}  // namespace infuse::attention_forward
