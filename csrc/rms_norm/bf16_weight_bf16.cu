#include "rms_norm/launch_planned.cuh"

namespace infuse::rms_norm {

template void launch_planned<DType::kBFloat16, DType::kBFloat16, DType::kBFloat16>(const Plan&, const Params&, int,
                                                                                   cudaStream_t);

}  // namespace infuse::rms_norm
