#include "norm/launch_planned.cuh"

namespace infuse::norm {

template void launch_planned<DType::kFloat32, DType::kFloat32>(const Target&, Operand, bool, const Plan&, const Params&);

}  // namespace infuse::norm
