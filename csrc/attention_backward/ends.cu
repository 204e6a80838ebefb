#include "attention_backward/launch_ends.cuh"

namespace infuse::attention_backward {

template void launch_first<DType::kBFloat16>(const Params&, int, cudaStream_t);
template void launch_first<DType::kFloat16>(const Params&, int, cudaStream_t);
template void launch_last<DType::kBFloat16>(const Params&, int, cudaStream_t);
template void launch_last<DType::kFloat16>(const Params&, int, cudaStream_t);

}  // namespace infuse::attention_backward
