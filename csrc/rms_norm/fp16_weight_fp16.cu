#include "rms_norm/launch_planned.cuh"

namespace infuse::rms_norm {

template void launch_planned<DType::kFloat16, DType::kFloat16, DType::kFloat16>(const Plan&, const Params&, int,
                                                                                cudaStream_t);

}  // namespace infuse::rms_norm
