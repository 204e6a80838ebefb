#include "norm/launch_planned.cuh"

namespace infuse::norm {

template void launch_planned<DType::kBFloat16, DType::kBFloat16>(const Target&, Operand, bool, const Plan&, const Params&);

}  // namespace infuse::norm
