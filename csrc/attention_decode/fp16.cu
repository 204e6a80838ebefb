#include "attention_decode/launch_planned.cuh"

namespace infuse::attention_decode {

template void launch_planned<DType::kFloat16>(const Plan&, const Params&, int, cudaStream_t);

}  // namespace infuse::attention_decode
