// An fp32 weight on two-byte activations; the output is fp32 when the value was rounded before the multiply.
#include "rms_norm/launch_planned.cuh"

namespace infuse::rms_norm {

template void launch_planned<DType::kBFloat16, DType::kFloat32, DType::kBFloat16>(const Plan&, const Params&, int,
                                                                                  cudaStream_t);
template void launch_planned<DType::kBFloat16, DType::kFloat32, DType::kFloat32>(const Plan&, const Params&, int,
                                                                                 cudaStream_t);

}  // namespace infuse::rms_norm
