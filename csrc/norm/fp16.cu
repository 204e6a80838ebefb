#include "norm/launch_planned.cuh"

namespace infuse::norm {

template void launch_planned<DType::kFloat16, DType::kFloat16>(const Target&, Operand, bool, const Plan&, const Params&);

}  // namespace infuse::norm
