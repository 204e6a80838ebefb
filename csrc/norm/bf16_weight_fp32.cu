// Weight and bias in fp32 beside two-byte activations; the output is fp32 when the value was rounded before them.
#include "norm/launch_planned.cuh"

namespace infuse::norm {

template void launch_planned<DType::kBFloat16, DType::kFloat32>(const Target&, Operand, bool, const Plan&, const Params&);

}  // namespace infuse::norm
