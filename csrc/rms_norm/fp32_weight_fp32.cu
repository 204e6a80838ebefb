#include "rms_norm/launch_planned.cuh"

namespace infuse::rms_norm {

template void launch_planned<DType::kFloat32, DType::kFloat32, DType::kFloat32>(const Plan&, const Params&, int,
                                                                                cudaStream_t);

}  // namespace infuse::rms_norm
