#include "norm_backward/launch_ring.cuh"

namespace infuse::norm_backward {

template int launch_ring<DType::kFloat16, DType::kFloat16>(const Prepared&, cudaStream_t);

}  // namespace infuse::norm_backward
