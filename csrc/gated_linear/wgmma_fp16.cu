#include "gated_linear/launch_wgmma.cuh"

namespace infuse::gated_linear {

template void launch_wgmma<DType::kFloat16>(const Config&, const Params&, int, cudaStream_t);

}  // namespace infuse::gated_linear
