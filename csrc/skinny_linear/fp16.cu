#include "skinny_linear/launch_planned.cuh"

namespace infuse::skinny_linear {

template void launch_norm<DType::kFloat16>(const Plan&, const Params&, void*, int, cudaStream_t);
template void launch_planned<DType::kFloat16>(const Plan&, const Params&, int, cudaStream_t);

}  // namespace infuse::skinny_linear
