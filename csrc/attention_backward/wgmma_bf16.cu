#include "attention_backward/launch_wgmma.cuh"

namespace infuse::attention_backward {

template void launch_wgmma<DType::kBFloat16>(const Plan&, const Params&, int, cudaStream_t);

}  // namespace infuse::attention_backward
