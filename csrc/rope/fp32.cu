#include "rope/launch_planned.cuh"

namespace infuse::rope {

template void launch_planned<DType::kFloat32>(const char*, const Plan&, DType, bool, const Params&, unsigned, int,
                                        cudaStream_t);

}  // namespace infuse::rope
