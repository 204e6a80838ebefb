#include "attention_forward/launch_wgmma.cuh"

namespace infuse::attention_forward {

template void launch_wgmma<DType::kFloat16>(const Plan&, const Params&, std::uint32_t*, int, cudaStream_t);

}  // namespace infuse::attention_forward
