#include "gated_linear/launch_handed.cuh"

namespace infuse::gated_linear {

template void launch_handed<DType::kFloat16>(const Config&, const Params&, int, cudaStream_t);

}  // namespace infuse::gated_linear
