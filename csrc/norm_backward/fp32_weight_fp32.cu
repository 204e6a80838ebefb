#include "norm_backward/launch_ring.cuh"

namespace infuse::norm_backward {

template int launch_ring<DType::kFloat32, DType::kFloat32>(const Prepared&, cudaStream_t);

}  // namespace infuse::norm_backward
