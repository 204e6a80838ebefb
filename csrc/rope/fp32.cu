#include "rope/launch_backward_planned.cuh"
#include "rope/launch_planned.cuh"

namespace infuse::rope {

template void launch_planned<DType::kFloat32>(const char*, const Plan&, DType, bool, const Params&, unsigned, int,
                                        cudaStream_t);
template void launch_backward_planned<DType::kFloat32>(const char*, const PreparedBackward&, cudaStream_t);

}  // namespace infuse::rope
