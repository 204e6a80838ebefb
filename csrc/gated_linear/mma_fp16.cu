#include "gated_linear/launch_mma.cuh"

namespace infuse::gated_linear {

template void launch_mma<DType::kFloat16>(const Config&, const Params&, int, cudaStream_t);

}  // namespace infuse::gated_linear
